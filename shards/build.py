"""Build a shard set: blocks of samples to tars, then index.parquet, then manifest.json.

Shard n holds samples n * samples_per_shard and on, less those that cannot be read, so that shards depend neither on
each other nor on the number of processes. A finished shard leaves .parts/<n>.json; a build that was killed skips those
and ends with the same bytes. build.json keeps the settings, so that no build is continued with others.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bigtrain.data.schema import INDEX_FILE, INDEX_SCHEMA, MANIFEST_FILE, Manifest, Sample, Shard, read_manifest
from shards.adapters import ADAPTERS, About
from shards.durable import alone_in, written_whole
from shards.names import safe_key
from shards.pack import Part, Task, fingerprint, shard_name, write_shard
from shards.progress import Progress

SETTINGS_FILE = "build.json"  # this builder's own note; no part of the shard contract
SKIPPED_FILE = "skipped.jsonl"
PARTS_FOLDER = ".parts"
MAX_IN_A_ROW = 100


@dataclass(frozen=True)
class Settings:
    """Whatever changes the bytes."""

    adapter: str
    root: str
    split: str
    samples_per_shard: int = 1000
    max_side: int | None = None
    name: str | None = None
    licence: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # the adapter's own


def build(settings: Settings, out: Path, workers: int = 1, max_skipped: float = 0.01) -> Manifest:
    """Build the set, or continue it, or find it finished; returns its manifest."""
    if finished(settings, out):
        manifest = read_manifest(str(out))
        shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)
        print(f"{out} is finished: {manifest.samples} samples in {len(manifest.shards)} shards. Nothing to do.")
        return manifest
    adapter = ADAPTERS[settings.adapter]
    if "://" in settings.root and adapter.split is not None:
        raise ValueError(
            f"--root {settings.root} is a URL, and `{settings.adapter}` reads a local disk: copy it there."
        )
    root: str | Path = settings.root if "://" in settings.root else Path(settings.root)
    about = adapter.about(root, settings.split, **settings.options)
    about = replace(about, dataset=settings.name or about.dataset, licence=settings.licence or about.licence)

    (out / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        for leftover in [*out.glob("*.tmp"), *(out / PARTS_FOLDER).glob("*.tmp")]:
            leftover.unlink()
        with written_whole(out / SETTINGS_FILE) as file:
            file.write((json.dumps(asdict(settings), indent=1, ensure_ascii=False) + "\n").encode())
        samples = keyed(adapter.samples(root, settings.split, **settings.options))
        shards, tables = pack_all(settings, out, about, samples, workers, max_skipped)
        with written_whole(out / INDEX_FILE) as file:
            pq.write_table(pa.concat_tables(tables), file, row_group_size=65536)
        manifest = Manifest(about.dataset, settings.split, tuple(about.classes), about.licence, tuple(shards))
        with written_whole(out / MANIFEST_FILE) as file:
            file.write(manifest.to_json().encode())
        shutil.rmtree(out / PARTS_FOLDER)
    return manifest


def finished(settings: Settings, out: Path) -> bool:
    """Whether the folder holds this very build; a folder with anything else in it is refused."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder, which may be new.")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not names - {PARTS_FOLDER}:
        return False
    if SETTINGS_FILE not in names:
        if all(name.startswith(SETTINGS_FILE) and name.endswith(".tmp") for name in names - {PARTS_FOLDER}):
            return False  # killed while it wrote its first file
        raise ValueError(
            f"--out {out} is not empty and was not begun by `bigtrain-shards build` (it holds {min(names)}): "
            "give a new or empty folder."
        )
    begun = json.loads((out / SETTINGS_FILE).read_text())
    asked = json.loads(json.dumps(asdict(settings)))
    differing = [name for name in asked if begun.get(name) != asked[name]]
    if differing:
        was = ", ".join(f"{name} {begun.get(name)!r}, not {asked[name]!r}" for name in differing)
        raise ValueError(
            f"--out {out} was begun with other settings ({was}): give the same ones to continue, "
            "or another --out, or delete the folder to begin anew."
        )
    return MANIFEST_FILE in names


def keyed(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Samples with safe keys, no key twice."""
    sources: dict[str, str] = {}
    for sample in samples:
        key = safe_key(sample.key)
        if key in sources:
            raise ValueError(
                f"{sample.source or sample.key} and {sources[key]} have the same key {key!r}: "
                "keys are names without extension, so rename one of the two, or take one away."
            )
        sources[key] = sample.source or sample.key
        source = sample.source.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a name may be no UTF-8
        yield replace(sample, key=key, source=source)


def pack_all(
    settings: Settings, out: Path, about: About, samples: Iterator[Sample], workers: int, max_skipped: float
) -> tuple[list[Shard], list[pa.Table]]:
    """Write every shard that is not there yet, and return the lines of the manifest and of the index."""
    shards: list[Shard] = []
    tables: list[pa.Table] = []
    skipped: list[dict[str, Any]] = []
    in_a_row = 0
    allowed = max(1, int(max_skipped * about.total)) if max_skipped > 0 else 0
    already = sum(1 for _ in (out / PARTS_FOLDER).glob("*.json")) * settings.samples_per_shard
    progress = Progress(about.total, done=0)
    if already:
        progress.say(f"{out}: continuing, about {min(already, about.total)} of {about.total} images are done")
    try:
        for part, is_new in in_order(
            settings, out, samples, min(workers, -(-about.total // settings.samples_per_shard))
        ):
            if is_new:
                save_part(out, part)
            else:
                progress.at_start += part.samples
            progress.add(part.samples)
            if part.shard is not None:
                tables.append(table_of(part.rows, len(shards)))
                shards.append(part.shard)
            for entry in part.skipped if is_new else ():
                progress.say(f"skipped {entry['source'] or entry['key']}: {entry['reason']}")
            skipped += part.skipped
            in_a_row = longest_run(part, in_a_row, budget=MAX_IN_A_ROW)
            if len(skipped) > allowed or in_a_row >= MAX_IN_A_ROW:
                what = f"{in_a_row} in a row" if in_a_row >= MAX_IN_A_ROW else f"{len(skipped)} of {about.total}"
                raise ValueError(
                    f"{what} pictures cannot be read, and {allowed} are allowed (or {MAX_IN_A_ROW - 1} in a row); "
                    f"the first is {skipped[0]['source'] or skipped[0]['key']} ({skipped[0]['reason']}). All are in "
                    f"{out / SKIPPED_FILE}: repair them, or allow more with --max-skipped, and run again."
                )
    finally:
        progress.close()
        write_skipped(out, skipped)
    for tar in out.glob("*.tar"):  # of an earlier run, when the dataset was larger
        if tar.name not in {shard.file for shard in shards}:
            tar.unlink()
    if not shards:
        raise ValueError(f"{settings.root} holds no picture that can be read: nothing to build.")
    if skipped:
        print(f"{len(skipped)} pictures could not be read; they are named in {out / SKIPPED_FILE}.", file=sys.stderr)
    speed = progress.speed()
    print(f"{out}: {sum(s.samples for s in shards)} samples in {len(shards)} shards, {speed:.0f} images/s.")
    return shards, tables


def longest_run(part: Part, before: int, budget: int) -> int:
    """Pictures skipped in a row at the part's end, or the budget if it was reached on the way."""
    bad = {entry["position"] for entry in part.skipped}
    run = before
    for position in range(part.samples):
        run = run + 1 if position in bad else 0
        if run >= budget:
            return run
    return run


def table_of(rows: list[dict[str, Any]], shard: int) -> pa.Table:
    return pa.Table.from_pylist([{**row, "shard": shard} for row in rows], schema=INDEX_SCHEMA)


def write_skipped(out: Path, skipped: list[dict[str, Any]]) -> None:
    if not skipped:
        (out / SKIPPED_FILE).unlink(missing_ok=True)
        return
    with written_whole(out / SKIPPED_FILE) as file:
        for entry in skipped:
            kept = {name: entry[name] for name in ("key", "source", "reason")}
            file.write((json.dumps(kept, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def save_part(out: Path, part: Part) -> None:
    with written_whole(out / PARTS_FOLDER / f"{part.number:06d}.json") as file:
        file.write(json.dumps(asdict(part)).encode())


def load_part(out: Path, number: int, samples: list[Sample]) -> Part | None:
    """The part that an earlier run finished, if it is of the same samples and its tar is there too."""
    path = out / PARTS_FOLDER / f"{number:06d}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    part = Part(**{**record, "shard": Shard(**record["shard"]) if record["shard"] else None})
    if part.fingerprint != fingerprint(samples):
        return None  # the dataset has changed since: the shard is written again
    tar = out / shard_name(number)
    if part.shard is not None and (not tar.is_file() or tar.stat().st_size != part.shard.bytes):
        return None
    return part


def in_order(settings: Settings, out: Path, samples: Iterator[Sample], workers: int) -> Iterator[tuple[Part, bool]]:
    """Parts by number, and whether each is new; with several workers, a few shards are written at a time."""

    def blocks() -> Iterator[Task | Part]:
        for number in itertools.count():
            block = list(itertools.islice(samples, settings.samples_per_shard))
            if not block:
                return
            yield load_part(out, number, block) or Task(out, number, block, settings.max_side)

    if workers <= 1:
        for block in blocks():
            yield (block, False) if isinstance(block, Part) else (write_shard(block), True)
        return
    waiting: deque[Part | Future[Part]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), worker_start, (os.getpid(),))
    try:
        for block in blocks():
            waiting.append(block if isinstance(block, Part) else pool.submit(write_shard, block))
            if len(waiting) > 2 * workers:
                yield first_of(waiting)
        while waiting:
            yield first_of(waiting)
    except BrokenProcessPool as error:
        raise ValueError(
            "a process of the build was killed (out of memory?): run the same command again with fewer --workers; "
            "it continues where it stopped."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def first_of(waiting: deque[Part | Future[Part]]) -> tuple[Part, bool]:
    first = waiting.popleft()
    return (first.result(), True) if isinstance(first, Future) else (first, False)


def worker_start(parent: int) -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
