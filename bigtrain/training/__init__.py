"""What every recipe shares. mixins: settings; read_split: data; run: one begin and one end; run_setup, stage, update,
optim: training; feature_cache, teacher_tokens: computed once; feature_table: many detectors; judging: the last step.
"""
