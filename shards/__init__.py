"""Raw pictures to tar shards: `bigtrain-shards build | check | show | split | index`.

    adapters/    what are the samples?       one file a data set
    keys, order  keys that are safe anywhere, each once; shuffled, if asked for
    treatment    what is done with each picture and mask: is it whole? how large as displayed? smaller, if asked for
    pack         samples -> one tar, the same bytes each time
    build        all shards, continued where a killed build stopped; then index.parquet, then manifest.json
    index_tars   the same index and manifest for shards that others made (survey: of one tar; labels: its classes)
    check        is a set whole?             show  what is in it? (contact_sheet: a page, by read_samples)
    split        subsets: some of the samples, none of the bytes

    location     a folder or a URL prefix, where files are whole or absent (disk: of a local build)
    worker_pool  work on many shards by several processes, results in order
    index_file, duplicates, members   of all samples together; of the members of one tar
    shards_cli, options               the command; existing_set: the set it is given; build_settings: of a build

The contract that all of it writes is bigtrain.data.schema (a mask is <key>.mask.png; training does not read masks),
with the columns of the index in bigtrain.data.set_files. Nothing here imports torch.
"""
