"""Building shards from a folder of JPEGs beside `tarfile` writing the same bytes, and, made smaller, beside its peers.

    python tests/benchmarks/building.py --pictures FOLDER [--copies 24] [--rounds 5]
    python tests/benchmarks/building.py --pictures FOLDER --peers-python PYTHON    made smaller
    python tests/benchmarks/building.py --scale 1000000

Each contender is a process of its own; its time is that of the work: without imports, with starting workers.
They take turns, and a ratio is of two times of the same round. Pictures are read from the page cache. tarfile writes
the members of the finished set (pictures and json) to as many tars, with and without fsync; a build always syncs.
Made smaller, all call the same code of shards/treatment.py: libjpeg's scaled decoding, Lanczos, JPEG of quality 95.
--scale: time and peak memory of a build of so many samples of 75 bytes, which is all bookkeeping.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_SIDE = 256
PER_SHARD = 256  # few, so that two workers have alike much to do
CHUNK_BYTES = 64 << 20  # of the peers' files


def prepare(pictures: Path, folder: Path, copies: int) -> None:
    """Class folders with copies of the pictures, each made different by a few bytes behind its end."""
    for number, path in enumerate(sorted(pictures.rglob("*.jpg"))):
        data = path.read_bytes()
        for copy in range(copies):
            target = folder / f"class{number % 10}" / f"{copy:04d}_{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data + f"copy {copy:8d}".encode())


def write_tars(pictures: Path, out: Path, sync: bool) -> None:
    paths = sorted(pictures.rglob("*.jpg"))
    for begin in range(0, len(paths), PER_SHARD):
        with (out / f"{begin:06d}.tar").open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for path in paths[begin : begin + PER_SHARD]:
                    name = path.relative_to(pictures)
                    tar.add(path, str(name))
                    record = {"classes": [path.parent.name], "boxes": [], "source": str(name)}
                    text = json.dumps(record, separators=(",", ":")).encode()
                    member = tarfile.TarInfo(f"{name.with_suffix('')}.json")
                    member.size = len(text)
                    tar.addfile(member, io.BytesIO(text))
            if sync:
                file.flush()
                os.fsync(file.fileno())


def build_set(pictures: Path, out: Path, workers: int, **settings: object) -> None:
    from shards.build import build
    from shards.build_settings import Settings

    chosen = Settings("folder", str(pictures), "train", samples_per_shard=PER_SHARD, **settings)
    build(chosen, out, workers=workers)


def smaller(path: str) -> dict:
    """One picture as every contender makes it smaller."""
    from shards.treatment import Treatment, checked

    picture = checked(Path(path).read_bytes(), "jpg", Treatment(max_side=MAX_SIDE))
    return {"image": picture.encoded, "classes": Path(path).parent.name}


def optimize_litdata(pictures: Path, out: Path, workers: int) -> None:
    import litdata

    paths = [str(path) for path in sorted(pictures.rglob("*.jpg"))]
    litdata.optimize(smaller, paths, str(out), chunk_bytes=CHUNK_BYTES, num_workers=workers, verbose=False)


def write_mds_part(paths: list[str], out: str) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=out, columns={"image": "bytes", "classes": "str"}, size_limit=CHUNK_BYTES) as writer:
        for path in paths:
            writer.write(smaller(path))


def write_mds(pictures: Path, out: Path, workers: int) -> None:
    """One writer a process and the indexes merged, as their documentation says."""
    import multiprocessing

    from streaming.base.util import merge_index

    paths = [str(path) for path in sorted(pictures.rglob("*.jpg"))]
    parts = [(paths[worker::workers], str(out / f"{worker}")) for worker in range(workers)]
    if workers == 1:
        write_mds_part(*parts[0])
        return
    with multiprocessing.Pool(workers) as pool:
        pool.starmap(write_mds_part, parts)
    merge_index(str(out), keep_local=True)


CONTENDERS = {
    "tarfile": lambda pictures, out: write_tars(pictures, out, sync=False),
    "tarfile, fsync": lambda pictures, out: write_tars(pictures, out, sync=True),
    "build, 1 worker": lambda pictures, out: build_set(pictures, out, 1),
    "build, 2 workers": lambda pictures, out: build_set(pictures, out, 2),
    "build --verify decode, 1 worker": lambda pictures, out: build_set(pictures, out, 1, verify="decode"),
    "build --verify decode, 2 workers": lambda pictures, out: build_set(pictures, out, 2, verify="decode"),
    "build --max-side 256, 1 worker": lambda pictures, out: build_set(pictures, out, 1, max_side=MAX_SIDE),
    "build --max-side 256, 2 workers": lambda pictures, out: build_set(pictures, out, 2, max_side=MAX_SIDE),
    "litdata optimize, 1 worker": lambda pictures, out: optimize_litdata(pictures, out, 1),
    "litdata optimize, 2 workers": lambda pictures, out: optimize_litdata(pictures, out, 2),
    "MDSWriter, 1 process": lambda pictures, out: write_mds(pictures, out, 1),
    "MDSWriter, 2 processes": lambda pictures, out: write_mds(pictures, out, 2),
}
RATIOS = [  # how many times as fast the first is
    ("build, 1 worker", "tarfile"),
    ("build, 1 worker", "tarfile, fsync"),
    ("build, 2 workers", "tarfile, fsync"),
    ("build, 2 workers", "build, 1 worker"),
    ("build --verify decode, 2 workers", "build --verify decode, 1 worker"),
    ("build --max-side 256, 2 workers", "build --max-side 256, 1 worker"),
    ("build --max-side 256, 1 worker", "litdata optimize, 1 worker"),
    ("build --max-side 256, 2 workers", "litdata optimize, 2 workers"),
    ("build --max-side 256, 1 worker", "MDSWriter, 1 process"),
    ("build --max-side 256, 2 workers", "MDSWriter, 2 processes"),
]


def is_peer(name: str) -> bool:
    return name.startswith(("litdata", "MDSWriter"))


def is_smaller(name: str) -> bool:
    return is_peer(name) or "--max-side" in name


def run_one(name: str, pictures: Path, out: Path) -> None:
    """In the contender's process: its imports, then its work, timed."""
    if name.startswith("build"):
        import shards.build  # noqa: F401

        with contextlib.suppress(ImportError):  # where it is installed, pyarrow imports it at the first table
            import pandas  # noqa: F401
    elif name.startswith("litdata"):
        import litdata  # noqa: F401
    elif name.startswith("MDS"):
        import streaming  # noqa: F401
    out.mkdir(parents=True)
    begun, begun_cpu = time.perf_counter(), cpu_seconds()
    CONTENDERS[name](pictures, out)
    print(f"\nseconds {time.perf_counter() - begun} {cpu_seconds() - begun_cpu}")


def cpu_seconds() -> float:
    """Of this process and the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def is_alone(name: str) -> bool:
    """Whether one process does the work; the CPU time of a fork server's children cannot be measured."""
    return "2 " not in name


def seconds_of(name: str, pictures: Path, disk: Path, peers_python: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    out = disk / "out"
    shutil.rmtree(out, ignore_errors=True)
    python = peers_python if is_peer(name) else sys.executable
    command = [python, __file__, "--one", name, "--pictures", str(pictures), "--disk", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    clock, cpu = done.stdout.split("\nseconds ")[1].split()[:2]
    return float(clock), float(cpu)


def compare(pictures: Path, disk: Path, rounds: int, peers_python: str | None) -> None:
    paths = list(pictures.rglob("*.jpg"))
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    print(f"{len(paths)} JPEGs, {megabytes:.0f} MB, written to {disk}; {rounds} rounds, {os.cpu_count()} CPUs\n")
    names = [name for name in CONTENDERS if is_smaller(name) == (peers_python is not None)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            by_clock, by_cpu = seconds_of(name, pictures, disk, peers_python or "")
            seconds[name].append(by_clock)
            cpu[name].append(by_cpu)
    print("| contender | s, median (least .. most) | CPU s | images/s | MB/s read |\n|---|---|---|---|---|")
    for name, found in seconds.items():
        median = statistics.median(found)
        span = f"{median:.2f} ({min(found):.2f} .. {max(found):.2f})"
        used = f"{statistics.median(cpu[name]):.2f}" if is_alone(name) else ""
        print(f"| {name} | {span} | {used} | {len(paths) / median:.0f} | {megabytes / median:.0f} |")
    print("\n| speed of / speed of | ratio, median (least .. most) | by CPU s |\n|---|---|---|")
    for fast, slow in RATIOS:
        if fast in seconds:
            found = [b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)]
            span = f"{statistics.median(found):.2f} ({min(found):.2f} .. {max(found):.2f})"
            by_cpu = statistics.median(b / a for a, b in zip(cpu[fast], cpu[slow], strict=True))
            print(f"| {fast} / {slow} | {span} | {f'{by_cpu:.2f}' if is_alone(fast) else ''} |")


def scale(count: int, disk: Path) -> None:
    """A build of `count` samples that an adapter makes up, then the same command again."""
    from PIL import Image

    import shards.build
    from bigtrain.data.schema import Object, Sample
    from shards.adapters import Adapter
    from shards.adapters.about import About

    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")

    def samples(root: Path, split: str):
        for number in range(count):
            picture, name = file.getvalue() + number.to_bytes(8, "big"), f"{number % 1000:03d}"
            yield Sample(f"{name}/{number:09d}", picture, "png", [Object(name)])

    about = About("scale", [f"{n:03d}" for n in range(1000)], "none", count)
    shards.build.ADAPTERS["scale"] = Adapter(lambda root, split: about, samples, "")
    settings = shards.build.Settings("scale", "", "train", samples_per_shard=PER_SHARD)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what in ("built", "found finished"):
        begun = time.perf_counter()
        shards.build.build(settings, disk / "out", workers=1)
        print(f"{count} samples {what} in {time.perf_counter() - begun:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 1024:.0f} MiB, of which {before / 1024:.0f} MiB before the first sample")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--copies", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk", type=Path, help="where everything is written; default: a temporary folder")
    parser.add_argument("--peers-python", help="with litdata and mosaicml-streaming: compare --max-side")
    parser.add_argument("--scale", type=int)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(args.one, args.pictures, args.disk)
        return
    with tempfile.TemporaryDirectory(dir=args.disk) as temporary:
        folder = Path(temporary)
        if args.scale:
            scale(args.scale, folder)
        else:
            prepare(args.pictures, folder / "pictures", args.copies)
            compare(folder / "pictures", folder, args.rounds, args.peers_python)


if __name__ == "__main__":
    main()
