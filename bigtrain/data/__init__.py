"""From shards to batches. schema: THE shard contract (set_files: its files); protocol: what is known, the split;
plan: the order of an epoch; shard_set, reader, fetch: bytes; decode, views: pixels; stream, work, workers, ahead,
mixture: batches; row_cache: views and tokens that are kept; later: numbers on their way from a device.
"""
