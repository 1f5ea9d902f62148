"""Is a shard set whole? Manifest, sizes, sha256, and each index row against its tar, reading each tar once."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigtrain.data.schema import MANIFEST_FILE, MASK_SUFFIX, Manifest, Shard, may_be_of
from bigtrain.data.set_files import read_index, shards_url
from bigtrain.progress import Progress
from bigtrain.text import class_name, counted
from shards.build import SKIPPED_FILE
from shards.existing_set import listed, manifest_of
from shards.labels import CLASSES_FROM, MAX_LABEL_BYTES
from shards.location import Location
from shards.members import Digested, members
from shards.worker_pool import Done, in_order

MAX_NAMED = 20  # of one kind in one shard
FEW_ROWS = 5  # of a shard, looked at by `quick`


@dataclass
class Held:
    """What one tar holds."""

    pictures: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # offset, size, extension
    classes: dict[str, list[str]] = field(default_factory=dict)  # as a json of our own form says
    json: set[str] = field(default_factory=set)
    masks: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


class Faults(list[str]):
    """One line a fault; of many in one shard only the first few, and a line with the number of the rest."""

    unnamed = 0

    @property
    def number(self) -> int:
        return len(self) + self.unnamed

    def add(self, lines: list[str], shard: Shard) -> None:
        more = len(lines) - MAX_NAMED
        self += lines[:MAX_NAMED]
        if more > 0:
            self.append(f"{shard.file}: and {more} more like these")
            self.unnamed += more - 1


class Task(NamedTuple):
    """A shard to be read whole, and its rows of the index."""

    tars: Location
    shard: Shard
    rows: pa.Table | None
    skipped: set[str]
    is_view: bool
    classes_from: str  # as in the manifest: "" is a set that was built here, whose samples all have a json


def check(url: str, quick: bool = False, workers: int = 1) -> Faults:
    """What is wrong with the set, a line each; `quick` looks at names, sizes and counts only.

    A folder without manifest is not a shard set: that is a ValueError.
    """
    place = Location(url)
    try:
        manifest = manifest_of(url)
    except ValueError as error:
        if place.size(MANIFEST_FILE) is not None:
            return Faults([str(error)])
        raise
    wrong = Faults()
    try:
        index = read_index(url)
    except (ValueError, OSError, pa.ArrowException) as error:
        index = None
        wrong.append(str(error))
    if index is not None:
        wrong += check_counts(manifest, index)
        if (np.diff(index["shard"].to_numpy()) < 0).any():
            index = index.sort_by("shard")
    skipped = skipped_keys(place)
    tars = Location(shards_url(url, manifest))
    there = listed(tars)
    named = {shard.file for shard in manifest.shards}
    if manifest.shards_at and there is not None and not named & there.keys():
        wrong.append(f"{tars}: no tar of this view lies there ({counted(len(named), 'tar')} should): have they moved?")
        return wrong
    if not manifest.shards_at:
        extra = sorted(name for name in (there or {}).keys() - named if name.endswith(".tar"))
        wrong += [f"{name}: not in the manifest" for name in extra]
    sizes = there if there is not None else {shard.file: tars.size(shard.file) for shard in manifest.shards}
    edges = [0] if index is None else np.searchsorted(index["shard"].to_numpy(), np.arange(len(manifest.shards) + 1))

    def tasks() -> Iterator[Task | Done[Faults]]:
        for number, shard in enumerate(manifest.shards):
            size, faults = sizes.get(shard.file), Faults()
            if size is None:
                faults.append(f"{shard.file}: missing{f' from {tars}' if manifest.shards_at else ''}")
            elif quick and size != shard.bytes:
                faults.append(f"{shard.file}: {size} bytes, and the manifest says {shard.bytes}")
            elif quick and index is not None and tars.folder is not None:
                faults += check_names(tars, shard, index.slice(edges[number], edges[number + 1] - edges[number]))
            elif not quick:
                rows = None if index is None else index.slice(edges[number], edges[number + 1] - edges[number])
                yield Task(
                    tars, shard, rows, skipped.get(shard.file, set()), bool(manifest.shards_at), manifest.classes_from
                )
                continue
            yield Done(faults)

    processes = 1 if quick or tars.of_one_process else min(workers, len(manifest.shards))
    with Progress(manifest.samples) as progress:
        for shard, (faults, _) in zip(manifest.shards, in_order(check_shard, tasks(), processes), strict=True):
            wrong += faults
            wrong.unnamed += faults.unnamed
            progress.add(shard.samples, shard.bytes, is_new=not quick)
    return wrong


def check_names(tars: Location, shard: Shard, rows: pa.Table) -> list[str]:
    """Whether a few pictures lie where the index says, by their headers: another tar may have the same size."""
    some = rows.take(pa.array(np.unique(np.linspace(0, max(rows.num_rows - 1, 0), FEW_ROWS).astype(int))[: len(rows)]))
    block = tarfile.BLOCKSIZE
    other = [
        f"{shard.file}: it has another picture where the index has {row['key']}, so it is not the tar of this index"
        for row in some.to_pylist()
        if row["image_offset"] < block
        or not may_be_of(tars.read_range(shard.file, row["image_offset"] - block, block), row["key"])
    ]
    return other[:1]


def check_counts(manifest: Manifest, index: pa.Table) -> list[str]:
    """Every key is unique, each shard has the rows that the manifest says, and it names every class."""
    wrong = []
    if pc.count_distinct(index["key"]).as_py() != index.num_rows:
        wrong += [
            f"index: the key {key!r} is there {times} times"
            for key, times in Counter(index["key"].to_pylist()).items()
            if times > 1
        ]
    rows = Counter(index["shard"].to_numpy().tolist())
    for number, shard in enumerate(manifest.shards):
        if (there := rows.pop(number, 0)) != shard.samples:
            wrong.append(f"index: {there} rows for {shard.file}, and the manifest says {shard.samples}")
    wrong += [f"index: {times} rows for a shard number {number} that does not exist" for number, times in rows.items()]
    shown = pc.unique(pc.list_flatten(index["classes"])).to_pylist()
    wrong += [
        f"index: the class {name!r} is not in the manifest" for name in sorted(set(shown) - set(manifest.classes))
    ]
    return wrong


def check_shard(task: Task) -> Faults:
    """One shard: its bytes and, if the tar is whole, its pictures and labels against its rows."""
    tars, shard, wrong, held = task.tars, task.shard, Faults(), Held()
    broken = ""
    try:
        with tars.opened(shard.file) as raw:
            file = Digested(raw)
            try:
                read_members(file, shard, held)
            except tarfile.TarError as error:
                broken = f"no whole tar ({error}), "
            file.finish()
    except OSError as error:
        wrong.append(f"{shard.file}: cannot be read ({error})")
        return wrong
    if file.bytes != shard.bytes:
        wrong.append(f"{shard.file}: {broken}{file.bytes} bytes, and the manifest says {shard.bytes}")
    elif file.sha256.hexdigest() != shard.sha256:
        wrong.append(f"{shard.file}: {broken}its bytes have changed since the manifest was written")
    elif broken:
        wrong.append(f"{shard.file}: {broken}and it was already so when the manifest was written")
    if broken:
        return wrong
    wrong.add(held.wrong, shard)
    if task.rows is None:
        return wrong
    rows = task.rows.to_pylist()
    unlike = [line for row in rows for line in check_row(row, held, task)]
    taken = {row["key"] for row in rows}
    if not task.is_view:
        surplus = [key for key in held.pictures if key not in taken and key not in task.skipped]
        unlike += [f"{shard.file}: {key} is in the tar, not in the index" for key in surplus]
    alone = sorted((held.masks | held.json) - held.pictures.keys())
    unlike += [f"{shard.file}: {key} has a json or mask and no picture" for key in alone]
    wrong.add(unlike, shard)
    return wrong


def read_members(file: Digested, shard: Shard, held: Held) -> None:
    compound: dict[str, tuple[int, int, str]] = {}
    for member in members(file):
        place = (member.offset, member.size, member.ext.lower().rsplit(".", 1)[-1])
        if member.is_image:
            if member.key in held.pictures:
                held.wrong.append(f"{shard.file}: the key {member.key!r} has two pictures")
            held.pictures[member.key] = place
        elif member.may_be_image:
            compound[member.key] = place
        elif member.ext == MASK_SUFFIX:
            held.masks.add(member.key)
        elif member.ext == "json":
            held.json.add(member.key)
            if member.size <= MAX_LABEL_BYTES:
                file.seek(member.offset)
                if (classes := own_classes(file.read(member.size))) is not None:
                    held.classes[member.key] = classes
    held.pictures = compound | held.pictures  # a.rgb.jpg is the picture where there is no a.jpg


def own_classes(text: bytes) -> list[str] | None:
    """The classes of a json in this project's form; None for any other."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    classes = record.get("classes") if isinstance(record, dict) and "boxes" in record else None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    return sorted({class_name(name) for name in classes})


def check_row(row: dict[str, Any], held: Held, task: Task) -> Iterator[str]:
    """One row of the index against the tar."""
    shard = task.shard
    said = (row["image_offset"], row["image_size"], row["image_ext"])
    found = held.pictures.get(row["key"])
    if found is None:
        yield f"{shard.file}: {row['key']} is in the index, not in the tar"
        return
    if found != said:
        yield (
            f"{shard.file}: {row['key']}.{found[2]} lies at {found[0]} with {found[1]} bytes, "
            f"and the index says .{said[2]} at {said[0]} with {said[1]}"
        )
    if not task.classes_from and held.json and row["key"] not in held.json:
        yield f"{shard.file}: {row['key']} has no json, and others in the tar have one"
    classes = held.classes.get(row["key"])
    # `index` may have taken numbers for places among --class-names
    is_comparable = not task.classes_from or (
        task.classes_from != CLASSES_FROM[1] and not any(map(str.isdecimal, classes or ()))
    )
    if is_comparable and classes is not None and classes != row["classes"]:
        yield f"{shard.file}: {row['key']}.json has the classes {classes}, and the index says {row['classes']}"


def skipped_keys(place: Location) -> dict[str, set[str]]:
    """Pictures that `index` found unreadable, by their tar: in it, and not in the index."""
    skipped: dict[str, set[str]] = {}
    try:
        for line in place.read(SKIPPED_FILE).decode().splitlines():
            record = json.loads(line)
            skipped.setdefault(record["source"].partition(":")[0], set()).add(record["key"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return skipped
