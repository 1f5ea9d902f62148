"""Index and manifest for WebDataset shards that others made; the tars stay as they are and where they are.

A run that is killed has written nothing, and starts over.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest, Shard
from bigtrain.files import read_lines
from bigtrain.progress import Progress
from bigtrain.text import counted
from shards.adapters.lists import warn, warn_of_alike, warn_of_one_hot
from shards.build import SKIPPED_FILE, contents_of, write_lines
from shards.disk import space_for
from shards.existing_set import listed
from shards.index_file import IndexWriter, columns_at, hash64, repeated
from shards.labels import CLASSES_FROM, numbers_first
from shards.location import Location
from shards.split import shards_at
from shards.survey import MAX_NAMED, Survey, Task, survey
from shards.worker_pool import in_order

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_SHARDS = 1_000_000
MANY_SAMPLES = 50  # above this, nearly one class a sample is warned of


def index_tars(
    folder: Path | str,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    split: str = "train",
    licence: str = "unknown",
    max_skipped: float = 0.01,
    out: Path | str | None = None,
    shards: str | None = None,
    workers: int = 1,
    classes_from: str = CLASSES_FROM[0],
    allow_unlabelled: bool = False,
) -> Manifest:
    """Write index.parquet, then manifest.json; samples that cannot be understood are named, and nothing is written.

    Args:
        folder: the tars' folder or URL prefix.
        out: a local folder for manifest and index; None: beside the tars.
        shards: names with {000..123}, or a file of names, one a line; None: all that lie in `folder`.
        allow_unlabelled: accept samples without a class among labelled ones.
        classes_from: "members": a sample's .json, .cls or .txt; "folder": the folder in its key, above the file.
    """
    place, target = locations(folder, out)
    tars = tars_in(place, shards)
    tasks = [Task(place, tar, class_names, classes_from) for tar in tars]
    found = Total()
    made = target.folder is not None and not target.folder.exists()
    with space_for(str(target)), contextlib.ExitStack() as lock, Progress(0) as progress:
        if target.folder is not None:
            target.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.enter_context(target.locked())
            target.prepare_among_others(INDEX_FILE, MANIFEST_FILE, SKIPPED_FILE)
            with target.written(INDEX_FILE) as file, IndexWriter(file) as index:
                processes = min(workers, len(tasks)) if not place.of_one_process else 1
                for one, _ in in_order(survey, tasks, processes):
                    index.add(one.rows, len(found.shards))
                    found.add(one)
                    progress.add(len(one.rows), one.shard.bytes)
                index.close()
                if found.hashes:
                    hashes_N = np.concatenate(found.hashes)
                    rows = np.sort(np.concatenate([*repeated(hashes_N), np.empty(0, np.int64)])).astype(np.int64)
                    found.wrong += repeated_keys(list(columns_at(file, rows, ["key", "shard"])), tars)
                check(place, found, max_skipped, allow_unlabelled)
        except BaseException:
            if made and target.folder is not None:
                target.folder.rmdir()
            raise
        write_lines(target, SKIPPED_FILE, found.skipped)
        classes = tuple(class_names) if class_names else tuple(sorted(found.classes, key=numbers_first))
        called = name or PurePosixPath(place.path if place.folder is None else str(place.folder.resolve())).name
        at = "" if target is place else shards_at(place.url.rstrip("/"), Path(target.path))
        manifest = Manifest(called, split, classes, licence, tuple(found.shards), at, classes_from=classes_from)
        with target.written(MANIFEST_FILE) as file:
            file.write(manifest.to_json().encode())
    print(f"{target}: {contents_of(manifest.samples, len(manifest.shards), classes)}.")
    summarise(target, found, manifest.samples)
    return manifest


def locations(folder: Path | str, out: Path | str | None) -> tuple[Location, Location]:
    """Where the tars are, and where index and manifest go; refused where these cannot be written or exist."""
    place = Location(str(folder))
    target = place if out is None else Location(str(out))
    if out is None:
        place.check_writable()
    elif target.folder is None:
        raise ValueError(f"--out {out} is a URL, and an index apart from its tars is a local folder: give one.")
    if place.folder is not None and not place.folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the folder of the .tar files.")
    if MANIFEST_FILE in target.sizes():
        raise ValueError(f"{target} has a {MANIFEST_FILE} already: delete it first if it is to be made again.")
    return place, target


class Total:
    """What all tars hold together."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.skipped: list[dict[str, str]] = []
        self.wrong: list[str] = []
        self.unlabelled: list[str] = []  # the first of them
        self.unlabelled_count = 0
        self.pickled: Counter[str] = Counter()
        self.classes: set[str] = set()
        self.of_texts = 0  # samples whose class comes from a .txt
        self.left_out: Counter[str] = Counter()  # reason -> members that are no sample's
        self.shown: set[tuple[str, ...]] = set()  # the classes that samples show together; one where all show the same
        self.hashes: list[NDArray[np.uint64]] = []  # of the keys

    def add(self, one: Survey) -> None:
        self.shards.append(one.shard)
        self.skipped += one.skipped
        self.wrong += one.wrong
        self.unlabelled += one.unlabelled[: MAX_NAMED - len(self.unlabelled)]
        self.unlabelled_count += len(one.unlabelled)
        self.pickled += one.pickled
        self.classes |= one.classes
        self.of_texts += one.of_texts
        self.left_out += one.left_out
        self.shown |= one.shown
        self.hashes.append(np.array([hash64(row["key"]) for row in one.rows], np.uint64))


def repeated_keys(rows: list[dict[str, Any]], tars: list[str]) -> list[str]:
    """A line for each repeated key; the rows must include all with such keys."""
    first: dict[str, int] = {}
    wrong = []
    for row in rows:
        if row["key"] in first:
            again, before = tars[row["shard"]], tars[first[row["key"]]]
            wrong.append(
                f"{again}: the key {row['key']!r} comes again (also in {before}), and a key is unique in a set"
            )
        else:
            first[row["key"]] = row["shard"]
    return wrong


def summarise(target: Location, found: Total, samples: int) -> None:
    """What was left out, and warnings of samples without any class and of classes that may be captions."""
    if found.skipped:
        unread = counted(len(found.skipped), "picture")
        print(f"{unread} cannot be read; {target}/{SKIPPED_FILE} lists them with the reasons.")
    if found.pickled:
        counts = ", ".join(f"{count} .{ext}" for ext, count in sorted(found.pickled.items()))
        print(f"Pickled members are never opened, because they could run any code: {counts} ignored.")
    if found.left_out:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(found.left_out.items()))
        print(f"Members that belong to no sample, as WebDataset reads a tar: {counts}.")
    warn_of_alike(found.classes, str(target))
    warn_of_one_hot(found.shown, samples, str(target))
    again = f"delete {target}/{MANIFEST_FILE} and index again"
    if not found.classes:
        warn(
            "no sample has a class, for classes come from a sample's .json (classes, label or class), .cls or .txt, in "
            f"this order: if the folders in the keys are the classes, {again} with --classes-from folder."
        )
    if found.of_texts:
        warn(
            f"{counted(found.of_texts, 'sample')} took a class from .txt, and there are "
            f"{counted(len(found.classes), 'class')}: if the texts are captions, these are not classes to train on."
        )
    elif samples > MANY_SAMPLES and len(found.classes) > samples / 2:
        warn(
            f"{len(found.classes)} classes of {samples} samples are nearly one for each: if they are captions, or "
            "numbers of pictures, they are not classes to train on."
        )


def check(place: Location, found: Total, max_skipped: float, allow_unlabelled: bool) -> None:
    """Refuse what cannot be understood, and more unreadable pictures than allowed."""
    if found.classes and found.unlabelled_count and not allow_unlabelled:
        first = ", ".join(found.unlabelled[:3])
        have = "has" if found.unlabelled_count == 1 else "have"
        found.wrong.append(
            f"{counted(found.unlabelled_count, 'sample')} {have} no class and others have one ({first} ...), which "
            "--allow-unlabelled allows"
        )
    if found.wrong:
        more = len(found.wrong) - MAX_NAMED
        listed = "; ".join(found.wrong[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"{place} cannot be indexed as it is: {listed}. Nothing was written.")
    samples = sum(shard.samples for shard in found.shards)
    allowed = max(1, int(max_skipped * (samples + len(found.skipped)))) if max_skipped > 0 else 0
    if not samples and not found.skipped:
        raise ValueError(f"{place} holds no sample: give the folder of WebDataset shards. Nothing was written.")
    if len(found.skipped) > allowed or not samples:
        first = "".join(f"; the first is {s['source']} ({s['reason']})" for s in found.skipped[:1])
        raise ValueError(
            f"{len(found.skipped)} of {samples + len(found.skipped)} pictures in {place} cannot be read, and "
            f"at most {allowed} may be{first}. Nothing was written: make the shards again, or raise --max-skipped."
        )


def tars_in(place: Location, shards: str | None) -> list[str]:
    """The names of the tars: those given, or all that lie there and are not hidden."""
    if shards is not None:
        return named_tars(shards)
    there = listed(place)
    if there is None:
        raise ValueError(
            f"{place} is a web server, which gives no list of its files: name them with --shards, "
            "say --shards 'train-{000000..001023}.tar', or a file of names."
        )
    there = {name: size for name, size in there.items() if not name.startswith(".")}  # ._000.tar, by macOS
    if packed := [name for name in sorted(there) if name.endswith(PACKED)]:
        raise ValueError(f"{place}/{packed[0]} is compressed, so no picture can be read by its offset: unpack to .tar.")
    tars = [name for name in sorted(there) if name.endswith(".tar")]
    if not tars:
        raise FileNotFoundError(f"{place} has no .tar files: give the folder of WebDataset shards.")
    return tars


def named_tars(shards: str) -> list[str]:
    """The names of a list in braces, or of a file with a name a line."""
    if Path(shards).is_file() and not shards.endswith(".tar"):
        names = read_lines(Path(shards))
    else:
        import braceexpand  # of webdataset, whose notation it is

        runs = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"\{(\d+)\.\.(\d+)", shards)]
        if math.prod(runs) > MAX_SHARDS:  # braceexpand would make them all at once
            raise ValueError(f"--shards {shards} gives {math.prod(runs)} names, and {MAX_SHARDS} are allowed.")
        try:
            names = list(braceexpand.braceexpand(shards))
        except ValueError as error:  # UnbalancedBracesError
            raise ValueError(f"--shards {shards} has unbalanced braces.") from error
    odd = [name for name in names if not name.endswith(".tar") or "/" in name or "\\" in name]
    if odd or not names or len(names) > MAX_SHARDS or len(set(names)) != len(names):
        what = f"names {odd[0]!r}" if odd else f"gives {len(names)} names, {len(set(names))} of them different"
        raise ValueError(
            f"--shards {shards} {what}: give the names of 1 to {MAX_SHARDS} .tar files in the folder or under the URL, "
            "each once, with {000..123} for running numbers, or a file with a name a line."
        )
    return names
