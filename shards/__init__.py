"""Raw pictures to tar shards: `bigtrain-shards build | check | show | split | index`.

    adapters/  what are the samples?       one file a dataset
    names      keys that are safe anywhere
    pictures   can it be decoded? how large is it? smaller, if asked for
    pack       samples -> one tar, the same bytes each time
    build      all shards, continued where a killed build stopped; then index.parquet, then manifest.json
    describe   the same index and manifest for shards that others made
    check      is a set whole?             show  what is in it? (page: a contact sheet)
    split      views: some of the samples, none of the bytes

The contract that all of it writes is bigtrain.data.schema. Nothing here imports torch.
"""
