"""From encoded bytes to normalised training crops: how near the stream is to a bare loop, and to its peers.

    OMP_NUM_THREADS=1 python tests/benchmarks/decoding.py --pictures FOLDER [--peers-python PYTHON]

FOLDER holds .jpg files at any depth. All contenders read the same files with the same transform, bigtrain's own
decoder, random crop to 224 and normalisation, so that what differs is how pictures reach it; each takes its turn in a
process of its own, and its clock starts with its first batch. litdata and mosaicml-streaming live in an environment
of their own (torch, torchvision, simplejpeg, pillow, pyarrow, fsspec, webdataset, litdata, mosaicml-streaming), whose
interpreter is PYTHON; without one they are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bigtrain.data.decode import JPEG_DECODERS, Picture  # noqa: E402
from bigtrain.data.views import RandomResizedCrop  # noqa: E402
from bigtrain.models.network import normalised  # noqa: E402

SIZE, BATCH = 224, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = RandomResizedCrop(SIZE, (0.08, 1.0))
PEERS = ("litdata", "mosaicml-streaming")


def view(payload: bytes) -> torch.Tensor:
    return torch.from_numpy(CROP(Picture(payload), np.random.default_rng(0))["image"])


def bare(data: Path, workers: int) -> Iterator[torch.Tensor]:
    """Bytes in memory, in this process."""
    payloads = [path.read_bytes() for path in sorted((data / "files").rglob("*.jpg"))]
    for first in range(0, len(payloads) - BATCH + 1, BATCH):
        yield torch.stack([view(payload) for payload in payloads[first : first + BATCH]])


def bigtrain(data: Path, workers: int) -> Iterator[torch.Tensor]:
    from bigtrain.data.plan import Plan
    from bigtrain.data.shard_set import ShardSet
    from bigtrain.data.stream import Stream

    shard_set = ShardSet(str(data / "shards"))
    plan = Plan(np.arange(len(shard_set)), shard_set.shard_N, BATCH)
    for batch in Stream(shard_set, plan, CROP, workers=workers).batches():
        yield batch.views["image"]


def image_folder(data: Path, workers: int) -> Iterable[torch.Tensor]:
    from torchvision.datasets import ImageFolder

    files = ImageFolder(str(data / "files"), loader=read, transform=view)
    loader = torch.utils.data.DataLoader(files, BATCH, shuffle=True, num_workers=workers)
    return (images for images, _ in loader)


def webdataset(data: Path, workers: int) -> Iterable[torch.Tensor]:
    import webdataset as wds

    tars = sorted(str(path) for path in (data / "shards").glob("*.tar"))
    samples = (
        wds.WebDataset(tars, shardshuffle=len(tars), nodesplitter=None).shuffle(1000).to_tuple("jpg").map_tuple(view)
    )
    return (images for (images,) in wds.WebLoader(samples.batched(BATCH), batch_size=None, num_workers=workers))


def litdata(data: Path, workers: int) -> Iterable[torch.Tensor]:
    from litdata import StreamingDataLoader, StreamingDataset

    class Views(StreamingDataset):
        def __getitem__(self, index: int) -> torch.Tensor:
            return view(super().__getitem__(index))

    return StreamingDataLoader(Views(str(data / "litdata"), shuffle=True), batch_size=BATCH, num_workers=workers)


def mosaicml(data: Path, workers: int) -> Iterable[torch.Tensor]:
    from streaming import StreamingDataset

    class Views(StreamingDataset):
        def __getitem__(self, index: int) -> torch.Tensor:
            return view(super().__getitem__(index)["jpg"])

    samples = Views(local=str(data / "mds"), shuffle=True, batch_size=BATCH)
    return torch.utils.data.DataLoader(samples, BATCH, num_workers=workers)


CONTENDERS: dict[str, Callable[[Path, int], Iterable[torch.Tensor]]] = {
    "bare loop over bytes in memory": bare,
    "bigtrain": bigtrain,
    "torchvision ImageFolder + DataLoader": image_folder,
    "webdataset": webdataset,
    "litdata": litdata,
    "mosaicml-streaming": mosaicml,
}


def speed(name: str, data: Path, workers: int) -> float:
    """Pictures a second, from the first batch on."""
    torch.set_num_threads(1)
    images = 0
    for number, image_B3HW in enumerate(CONTENDERS[name](data, workers)):
        normalised(image_B3HW, MEAN, STD)
        if number == 0:
            began = time.perf_counter()
        else:
            images += len(image_B3HW)
    return images / (time.perf_counter() - began)


def in_own_process(python: str, name: str, data: Path, workers: int) -> float:
    command = [python, __file__, "--one", name, "--data", str(data), "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip()}")
    return float(done.stdout.strip().splitlines()[-1])


def prepare(pictures: Path, data: Path, copies: int, peers: str | None) -> int:
    """The same pictures as files, shards and in the formats of the peers."""
    originals = sorted(pictures.rglob("*.jpg"))
    if not originals:
        sys.exit(f"{pictures} holds no .jpg files.")
    for number in range(copies):
        for place, path in enumerate(originals):
            copy = data / "files" / f"class{place % 4}" / f"{number:03d}-{place:05d}.jpg"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    build = [sys.executable, "-m", "shards", "build", "folder", "--root", str(data / "files")]
    subprocess.run([*build, "--out", str(data / "shards"), "--samples-per-shard", "500"], check=True, cwd=ROOT)
    if peers:
        # litdata clears its caches at startup, and one of them is /tmp/data by default
        caches = {
            name: str(data / name) for name in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER")
        }
        command = [peers, __file__, "--convert", "--data", str(data)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **caches})
    return copies * len(originals)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def convert(data: Path) -> None:
    """In the peers' environment: the files in their formats."""
    from litdata import optimize
    from streaming import MDSWriter

    files = sorted(str(path) for path in (data / "files").rglob("*.jpg"))
    optimize(read, files, str(data / "litdata"), chunk_bytes="64MB", num_workers=1)
    with MDSWriter(out=str(data / "mds"), columns={"jpg": "bytes"}) as writer:
        for path in files:
            writer.write({"jpg": read(path)})


def decoders(pictures: Path) -> None:
    payloads = [path.read_bytes() for path in sorted(pictures.rglob("*.jpg"))[:200]]
    print("\n| decoder | whole JPEGs, ms a picture | ratio to Pillow |\n|---|---|---|")
    spent: dict[str, list[float]] = {name: [] for name in JPEG_DECODERS}
    for _ in range(5):
        for name in JPEG_DECODERS:
            began = time.perf_counter()
            for payload in payloads:
                with contextlib.suppress(Exception):  # the rare one that only Pillow reads
                    JPEG_DECODERS[name](payload, 1)
            spent[name].append((time.perf_counter() - began) / len(payloads) * 1e3)
    for name, found in spent.items():
        ratios = [own / pillow for own, pillow in zip(found, spent["pillow"], strict=True)]
        print(f"| {name} | {statistics.median(found):.2f} | {spread(ratios)} |")


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--peers-python")
    parser.add_argument("--copies", type=int, default=8, help="of each picture")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    for inner in ("--one", "--data"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--convert", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(speed(given.one, Path(given.data), given.workers))
        return
    if given.convert:
        convert(Path(given.data))
        return
    torch.set_num_threads(1)
    decoders(given.pictures)
    names = [name for name in CONTENDERS if given.peers_python or name not in PEERS]
    with tempfile.TemporaryDirectory() as folder:
        count = prepare(given.pictures, Path(folder), given.copies, given.peers_python)
        found: dict[str, list[float]] = {name: [] for name in [*names, "bigtrain, 2 workers"]}
        for _ in range(given.repeats):
            for name in names:
                python = given.peers_python if name in PEERS else sys.executable
                found[name].append(in_own_process(python, name, Path(folder), given.workers))
            found["bigtrain, 2 workers"].append(in_own_process(sys.executable, "bigtrain", Path(folder), 2))
    print(f"\n{count} pictures, {given.workers} worker(s) where nothing else is said,")
    print(f"median (least .. most) of {given.repeats} turns:")
    print("\n| contender | pictures/s | ratio to the bare loop |\n|---|---|---|")
    for name, speeds in found.items():
        ratios = [own / loop for own, loop in zip(speeds, found["bare loop over bytes in memory"], strict=True)]
        print(f"| {name} | {statistics.median(speeds):.0f} | {spread(ratios)} |")


if __name__ == "__main__":
    main()
