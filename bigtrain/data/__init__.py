"""From shards to batches. schema: THE shard contract (set_files: its files); protocol: what is known, the split;
plan: the order of an epoch; shard_set, reader, fetch: bytes; decode, views: pixels; stream, workers, mixture: batches.
"""
