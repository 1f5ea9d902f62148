"""From shards to batches: schema, protocol, plan, stream (workers), views, masks."""
