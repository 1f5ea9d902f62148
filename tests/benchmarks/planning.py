"""Fourteen million samples: how long it takes to open the set, to plan an epoch, and to resume at 90 % of one.

    OMP_NUM_THREADS=1 python tests/benchmarks/planning.py

The set is real to the byte: one shard of 1000 small pictures, linked under as many names as are needed, and an index
with a row for every sample. Each figure is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest, Shard  # noqa: E402
from bigtrain.data.set_files import INDEX_SCHEMA  # noqa: E402
from shards.index_file import ROWS_PER_GROUP  # noqa: E402

PER_SHARD, CLASSES, GLOBAL_BATCH, RANKS = 1000, 1000, 4096, 64
MEASURES = ("open", "plan", "resume, no workers", "resume, 2 workers")


def make(folder: Path, shards: int) -> None:
    rng = np.random.default_rng(0)
    first = folder / "000000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(PER_SHARD):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = file.tell()
            tar.addfile(info, io.BytesIO(file.getvalue()))
    with tarfile.open(first) as tar:
        places = [(member.offset_data, member.size) for member in tar]
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(folder / INDEX_FILE, INDEX_SCHEMA) as writer:
        for shard in range(shards):
            if shard:
                os.link(first, folder / f"{shard:06d}.tar")
            columns = {
                "key": [f"train/n{n:08d}/n{n:08d}_{shard}" for n in range(PER_SHARD)],
                "shard": [shard] * PER_SHARD,
                "image_offset": [offset for offset, _ in places],
                "image_size": [size for _, size in places],
                "image_ext": ["jpg"] * PER_SHARD,
                "width": [64] * PER_SHARD,
                "height": [64] * PER_SHARD,
                "classes": [[f"n{n % CLASSES:08d}"] for n in range(PER_SHARD)],
            }
            waiting.append(pa.table(columns, schema=INDEX_SCHEMA))
            if len(waiting) * PER_SHARD >= ROWS_PER_GROUP or shard == shards - 1:
                writer.write_table(pa.concat_tables(waiting), row_group_size=len(waiting) * PER_SHARD)
                waiting = []
    size = first.stat().st_size
    lines = tuple(Shard(f"{n:06d}.tar", PER_SHARD, size, "0" * 64) for n in range(shards))
    names = tuple(f"n{n:08d}" for n in range(CLASSES))
    (folder / MANIFEST_FILE).write_text(Manifest("synthetic", "train", names, "none", lines).to_json())


def measure(what: str, folder: str) -> dict[str, float]:
    from bigtrain.data.plan import Plan
    from bigtrain.data.shard_set import ShardSet
    from bigtrain.data.stream import Stream
    from bigtrain.data.views import RandomResizedCrop
    from bigtrain.data.workers import prepare_workers

    before = peak_mb()
    began = time.perf_counter()
    workers = 2 if "2" in what else 0
    prepare_workers(workers)  # as a recipe does
    shard_set = ShardSet(folder)
    plan = Plan(np.arange(len(shard_set)), shard_set.shard_N, GLOBAL_BATCH)
    if what != "open":
        before, began = peak_mb(), time.perf_counter()
        if what == "plan":
            plan.order(0)
        else:
            stream = Stream(shard_set, plan, RandomResizedCrop(64), world_size=RANKS, workers=workers)
            next(stream.batches(plan.position_at(int(0.9 * plan.batches_per_epoch))))
    return {"seconds": time.perf_counter() - began, "mb": peak_mb() - before}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shards", type=int, default=14_000)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), given.shards)
        print(f"{given.shards * PER_SHARD} samples in {given.shards} shards, ", end="")
        print(f"global batch {GLOBAL_BATCH} on {RANKS} ranks\n")
        print("| what | seconds | MB more at its peak |\n|---|---|---|")
        for what in MEASURES:
            command = [sys.executable, __file__, "--measure", what, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            print(f"| {what} | {found['seconds']:.2f} | {found['mb']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
