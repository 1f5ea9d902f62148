"""Reading alone, without decoding: samples a second side by side, and what it costs in bytes and requests.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/reading.py --pictures FOLDER [--peers-python PYTHON]

FOLDER holds JPEG files, at any depth; they become shards first. PYTHON is an interpreter with litdata and
mosaicml-streaming; they read the same pictures in their own formats. All ways are timed in turn, so that each repeat
compares what ran beside each other; a ratio is the median (least .. most) over the repeats.
"""

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from webdataset.tariterators import tarfile_to_samples

sys.path.insert(0, str(Path(__file__).parents[2]))

from bigtrain.data.memory import keep_freed_memory
from bigtrain.data.set_files import INDEX_SCHEMA
from bigtrain.data.shard_set import ShardSet
from tests.servers import Proxy, start_nginx, start_s3

RUN = 32  # samples of a call, as a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--peers-python", type=Path)
    parser.add_argument("--at-most", type=int, default=20_000)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    pictures = sorted(p for p in options.pictures.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    pictures = pictures[: options.at_most]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_set(folder / "set", pictures, options.samples_per_shard)
        total = sum(p.stat().st_size for p in pictures)
        print(f"{len(pictures)} pictures of {total / len(pictures) / 1000:.1f} kB\n")
        local_table(folder, pictures, options.repeats, options.peers_python)
        filter_table(folder / "set")
        remote_table(folder)


def write_set(folder: Path, pictures: list[Path], samples_per_shard: int) -> None:
    """The pictures as a shard set of 100 classes, the label of each sample behind it as the builder writes it."""
    folder.mkdir(parents=True)
    rows, shards = [], []
    for first in range(0, len(pictures), samples_per_shard):
        path = folder / f"{len(shards):06d}.tar"
        some = pictures[first : first + samples_per_shard]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, picture in enumerate(some, first):
                classes = [f"class{number * 37 % 100:02d}"]
                record = {"classes": classes, "boxes": [], "source": picture.name}
                for ext, data in (("jpg", picture.read_bytes()), ("json", json.dumps(record).encode())):
                    info = tarfile.TarInfo(f"{number:08d}.{ext}")
                    info.size = len(data)
                    if ext == "jpg":
                        place = {"shard": len(shards), "image_offset": tar.offset + 512, "image_size": len(data)}
                        shown = {"image_ext": "jpg", "width": 0, "height": 0, "classes": classes}
                        rows.append({"key": f"{number:08d}", **place, **shown})
                    tar.addfile(info, io.BytesIO(data))
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        shards.append({"file": path.name, "samples": len(some), "bytes": len(data), "sha256": digest})
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), folder / "index.parquet")
    record = {"format": "bigtrain-shards", "version": 1, "dataset": "reading", "split": "train", "licence": ""}
    record |= {"classes": [f"class{c:02d}" for c in range(100)], "samples": len(rows), "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(record))


def local_table(folder: Path, pictures: list[Path], repeats: int, peers_python: Path | None) -> None:
    shard_set = ShardSet(str(folder / "set"))
    keep_freed_memory()  # as the stream does, for all that read in this process
    count, total = len(shard_set), sum(p.stat().st_size for p in pictures)
    tars = sorted(str(p) for p in (folder / "set").glob("*.tar"))
    in_order = np.arange(count)
    starts = np.random.default_rng(0).permutation(-(-count // RUN)) * RUN
    in_runs = np.concatenate([in_order[start : start + RUN] for start in starts])
    ways = {
        f"bigtrain, runs of {RUN} in random order": lambda: read_set(shard_set, in_runs),
        "bigtrain, every sample in random order": lambda: read_set(
            shard_set, np.random.default_rng(0).permutation(count)
        ),
        "bare os.pread of each picture": lambda: read_bare(shard_set, in_order),
        "webdataset, WebDataset(tars)": lambda: images(wds.WebDataset(tars, shardshuffle=False)),
        "webdataset, DataPipeline": lambda: images(wds.DataPipeline(wds.SimpleShardList(tars), tarfile_to_samples())),
        "plain tarfile": lambda: read_tars(tars),
    }
    if peers_python:
        listing = folder / "pictures.json"
        listing.write_text(json.dumps([str(p.absolute()) for p in pictures]))
        for peer in ("litdata", "mosaicml-streaming"):
            ways[peer] = lambda peer=peer: ask_peer(peers_python, folder / peer, listing, peer)
            ways[peer]()  # it writes its format
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, read in ways.items():
            found, size, *own_rate = read()  # the first pass warms up
            assert (found, size) == (count, total), (way, found, count, size, total)
            rates[way].append(own_rate[0] if own_rate else passes_per_s(read) * count)
    print("| reading alone, one process, files in memory | samples/s | times webdataset |\n|---|---|---|")
    base = rates["webdataset, WebDataset(tars)"]
    for way, found in rates.items():
        print(
            f"| {way} | {statistics.median(found):,.0f} | {spread([a / b for a, b in zip(found, base, strict=True)])} |"
        )
    print()


def passes_per_s(read) -> float:
    """The best of as many passes as fit into half a second, and of three at least, as of the peers."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.5:
        began = time.perf_counter()
        read()
        times.append(time.perf_counter() - began)
    return 1 / min(times)


def read_set(shard_set: ShardSet, order_N: np.ndarray) -> tuple[int, int]:
    """As a worker does: shard, offset and size in, bytes out, a batch at a time."""
    reader, total = shard_set.reader(), 0
    for first in range(0, len(order_N), RUN):
        total += sum(map(len, reader.read(*shard_set.places(order_N[first : first + RUN]))))
    return len(order_N), total


def read_bare(shard_set: ShardSet, order_N: np.ndarray) -> tuple[int, int]:
    """The limit: one call of the system for each picture, and nothing around it."""
    files = [os.open(f"{shard_set.url}/{shard.file}", os.O_RDONLY) for shard in shard_set.manifest.shards]
    places = zip(*(place_N.tolist() for place_N in shard_set.places(order_N)), strict=True)
    total = sum(len(os.pread(files[shard], size, offset)) for shard, offset, size in places)
    for file in files:
        os.close(file)
    return len(order_N), total


def images(samples) -> tuple[int, int]:
    count = total = 0
    for sample in samples:
        count, total = count + 1, total + len(sample["jpg"])
    return count, total


def read_tars(tars: list[str]) -> tuple[int, int]:
    count = total = 0
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".jpg"):
                    count, total = count + 1, total + len(data)
    return count, total


def ask_peer(python: Path, made: Path, listing: Path, peer: str) -> tuple[int, int, float]:
    command = [python, Path(__file__).with_name("reading_peer.py"), peer, made, listing]
    # litdata clears its caches, which by default are folders in the machine's shared /tmp
    caches = {f"DATA_OPTIMIZER_{name}FOLDER": str(made) + name for name in ("CACHE_", "DATA_CACHE_")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **caches})
    count, total, per_s = json.loads(done.stdout.strip().splitlines()[-1])
    return count, total, per_s


def filter_table(folder: Path) -> None:
    shard_set = ShardSet(str(folder))
    print("| filtering by class, in order | pictures | bytes read | share of the tars |\n|---|---|---|---|")
    whole = sum(shard.bytes for shard in shard_set.manifest.shards)
    for what, classes in (("one class in a hundred", ("class07",)), ("all", shard_set.classes)):
        reader, wanted_N = shard_set.reader(), np.flatnonzero(shard_set.shows_any(classes))
        for first in range(0, len(wanted_N), RUN):
            reader.read(*shard_set.places(wanted_N[first : first + RUN]))
        print(f"| {what} | {len(wanted_N)} | {reader.bytes_read:,} | {reader.bytes_read / whole:.2%} |")
    print()


def remote_table(folder: Path) -> None:
    """Behind nginx and S3 on loopback; requests are counted by a second pass through a proxy, which is slow."""
    print(
        "| 512 samples, over the wire, 64 a call | run | MB/s | requests | bytes read / wanted |\n|---|---|---|---|---|"
    )
    (folder / "www").symlink_to(folder / "set")
    bucket = "s3://pictures"
    with start_nginx(folder) as nginx, start_s3() as endpoint:
        for name, upstream, url in (("nginx", nginx, None), ("S3 (moto)", endpoint, bucket)):
            if url:
                fsspec.config.conf["s3"] = {"endpoint_url": upstream, "key": "key", "secret": "secret"}
                fsspec.filesystem("s3").mkdir(bucket)
                for path in sorted((folder / "set").iterdir()):
                    fsspec.filesystem("s3").put(str(path), f"{bucket}/{path.name}")
            proxy = Proxy(upstream)
            for run in (1, 8, 32):
                mb_per_s, read, wanted = timed_runs(url or upstream, run)
                if url:
                    fsspec.config.conf["s3"]["endpoint_url"] = proxy.url
                proxy.asked.clear()
                timed_runs(url or proxy.url, run)
                asked = sum(path.endswith(".tar") for path, _ in proxy.asked)
                if url:
                    fsspec.config.conf["s3"]["endpoint_url"] = upstream
                print(f"| {name} | {run} | {mb_per_s:.1f} | {asked} | {read / wanted:.3f} |")
            proxy.close()


def timed_runs(url: str, run: int) -> tuple[float, int, int]:
    shard_set = ShardSet(url)
    starts = np.random.default_rng(run).permutation(len(shard_set) // run - 1)[: 512 // run] * run
    order_N = (starts[:, None] + np.arange(run)).ravel()
    reader = shard_set.reader()
    reader.read(*shard_set.places(order_N[:1]))  # opens the connection
    began, wanted = time.perf_counter(), 0
    for first in range(0, len(order_N), 64):
        wanted += sum(map(len, reader.read(*shard_set.places(order_N[first : first + 64]))))
    return wanted / 1e6 / (time.perf_counter() - began), reader.bytes_read, wanted


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} .. {max(values):.1f})"


if __name__ == "__main__":
    main()
