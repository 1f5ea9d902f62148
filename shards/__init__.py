"""Raw pictures to tar shards: `bigtrain-shards build | check | show | split | index`.

    adapters/  what are the samples?       one file a dataset
    names      keys that are safe anywhere
    order      each key once; shuffled, if asked for
    pictures   is it whole? how large is it as displayed? smaller, if asked for
    pack       samples -> one tar, the same bytes each time
    build      all shards, continued where a killed build stopped; then index.parquet, then manifest.json
    describe   the same index and manifest for shards that others made (survey: of one tar; labels: its classes)
    check      is a set whole?             show  what is in it? (page: a contact sheet)
    split      views: some of the samples, none of the bytes

    place      a folder or a URL prefix, where files are whole or absent (durable: how, in a folder)
    crew       work on many shards by several processes, answers in order
    index_file, duplicates   what is known of all samples together
    cli, options             the command; given: the set that it is given; settings: of a build; words: plurals

The contract that all of it writes is bigtrain.data.schema, with the columns of the index in bigtrain.data.set_files.
Nothing here imports torch.
"""
