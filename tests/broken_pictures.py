"""Shard sets with pictures that cannot be decoded."""

import shutil

from bigtrain.data.shard_set import ShardSet


def with_broken_picture(source, folder, sample):
    """A copy of a shard set in which a picture cannot be decoded."""
    shutil.copytree(source, folder)
    copy = ShardSet(str(folder))
    shard = folder / copy.manifest.shards[int(copy.shard_N[sample])].file
    data = bytearray(shard.read_bytes())
    begin = int(copy._offset_N[sample])
    data[begin : begin + 8] = b"not a png"[:8]
    shard.write_bytes(data)
    return copy
