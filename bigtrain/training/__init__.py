"""What recipes share. mixins: settings; read_split: data; run: how a run begins and ends; run_setup, stage, step,
update, optim, compiling: training; caches, teacher_tokens, token_rows, feature_cache: what is made once; feature_table:
many detectors; judging: the last step.
"""
