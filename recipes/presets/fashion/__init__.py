"""The preset of recipes/defend.py without --train. prepare: its shards; make_sample: how the sample was made."""
