"""From shards to batches: schema, protocol, plan, stream, views, masks."""
