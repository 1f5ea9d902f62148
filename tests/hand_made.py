"""A shard set written by hand, from the contract alone: no code of `shards` takes part."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigtrain.data.set_files import INDEX_SCHEMA
from bigtrain.data.shard_set import ShardSet


def png(pixels_HW3):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels_HW3, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def write_set(tmp_path):
    """write_set([(classes, picture bytes), ...], per_shard=, name=) -> ShardSet; the keys are k0, k1, ..."""

    def write(samples, *, per_shard=4, classes=None, name="set"):
        folder = tmp_path / name
        folder.mkdir()
        rows, shards = [], []
        for first in range(0, len(samples), per_shard):
            path = folder / f"{len(shards):06d}.tar"
            some = range(first, min(first + per_shard, len(samples)))
            with tarfile.open(path, "w") as tar:
                for i in some:
                    info = tarfile.TarInfo(f"k{i}.png")
                    info.size = len(samples[i][1])
                    tar.addfile(info, io.BytesIO(samples[i][1]))
            with tarfile.open(path) as tar:
                for i, member in zip(some, tar, strict=True):
                    place = {"shard": len(shards), "image_offset": member.offset_data, "image_size": member.size}
                    shown = {"image_ext": "png", "width": 8, "height": 8, "classes": sorted(samples[i][0])}
                    rows.append({"key": f"k{i}", **place, **shown})
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            shards.append({"file": path.name, "samples": len(some), "bytes": len(data), "sha256": digest})
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), folder / "index.parquet")
        record = {"format": "bigtrain-shards", "version": 1, "dataset": "hand", "split": "train", "licence": "none"}
        record["classes"] = classes or sorted({c for shown, _ in samples for c in shown})
        (folder / "manifest.json").write_text(json.dumps({**record, "samples": len(rows), "shards": shards}))
        return ShardSet(str(folder))

    return write


@pytest.fixture
def noise():
    """A picture of noise as PNG: noise(seed)."""
    return lambda seed=0: png(np.random.default_rng(seed).integers(0, 256, (9, 11, 3)))
