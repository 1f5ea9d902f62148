"""What recipes share. mixins: settings; read_split: data; run: how a run begins and ends; run_setup, stage, update,
optim: training; feature_cache, teacher_tokens: computed once; feature_table: many detectors; judging: the last step.
"""
