"""Build a shard set: blocks of samples to tars, then index.parquet, then manifest.json.

Shard n holds samples n * samples_per_shard and on, less those that cannot be read, so that shards depend neither on
each other nor on the number of processes. A finished shard leaves .parts/<n>.json; a build that was killed skips those
and ends with the same bytes. build.json keeps the settings, so that no build is continued with others.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest, Sample, Shard
from bigtrain.data.set_files import read_manifest
from bigtrain.files import TEMPORARY
from bigtrain.progress import Progress
from bigtrain.text import class_name, counted
from shards.adapters import ADAPTERS
from shards.adapters.about import About
from shards.adapters.lists import few
from shards.build_settings import Settings, begun_with
from shards.disk import space_for
from shards.duplicates import Equals, duplicates
from shards.existing_set import SETTINGS_FILE
from shards.index_file import IndexWriter
from shards.labels import as_text
from shards.location import Location
from shards.order import keyed, shuffled
from shards.pack import Part, Task, fingerprint, shard_name, write_shard
from shards.worker_pool import Done, in_order

# this builder's own notes; no part of the shard contract
SKIPPED_FILE = "skipped.jsonl"
DUPLICATES_FILE = "duplicates.jsonl"
PARTS_FOLDER = ".parts"
MAX_IN_A_ROW = 100


def build(settings: Settings, out: Path | str, workers: int = 1, max_skipped: float = 0.01) -> Manifest:
    """Build the set, or continue it, or find it finished; returns its manifest."""
    place = Location(str(out))
    place.check_writable()
    if finished(settings, place):
        with place.locked():
            manifest = read_manifest(str(out))
            place.remove(PARTS_FOLDER)
            there = place.sizes()
            lost = [shard.file for shard in manifest.shards if there.get(shard.file) != shard.bytes]
            if not lost:
                held = contents_of(manifest.samples, len(manifest.shards), manifest.classes)
                print(f"{out} is finished: {held}. Nothing to do.")
                return manifest
            again = f"{out} was finished, but {few(lost)} are missing or were changed: it is built again."
            print(again, file=sys.stderr)
            place.remove(MANIFEST_FILE)
    adapter = ADAPTERS[settings.adapter]
    if "://" in settings.root and adapter.split is not None:
        raise ValueError(
            f"--root {settings.root} is a URL, and `{settings.adapter}` reads a local disk: copy it there."
        )
    root: str | Path = settings.root if "://" in settings.root else Path(settings.root)
    about = adapter.about(root, settings.split, **settings.options)
    about = about._replace(classes=class_names(about.classes, settings.root))
    about = about._replace(folder_order=tuple(map(class_name, about.folder_order)))
    about = about._replace(dataset=settings.name or about.dataset, licence=settings.licence or about.licence)

    with space_for(str(out)):
        if place.folder is not None:
            place.folder.mkdir(parents=True, exist_ok=True)
        with place.locked():
            place.prepare(PARTS_FOLDER)
            with place.written(SETTINGS_FILE) as file:
                file.write((json.dumps(settings.record, indent=1, ensure_ascii=False) + "\n").encode())
            samples = keyed(lambda: adapter.samples(root, settings.split, **settings.options))
            if settings.shuffle_seed is not None:
                beside = place.folder / PARTS_FOLDER if place.folder is not None else None
                samples = shuffled(samples, settings.shuffle_seed, beside)
            shards = pack_all(settings, place, about, samples, 1 if place.of_one_process else workers, max_skipped)
            manifest = Manifest(
                about.dataset, settings.split, tuple(about.classes), about.licence, tuple(shards),
                folder_order=about.folder_order,
            ).checked(f"the adapter of {about.dataset}")  # fmt: skip
            with place.written(MANIFEST_FILE) as file:
                file.write(manifest.to_json().encode())
            place.remove(PARTS_FOLDER)
    return manifest


def class_names(names: Sequence[str], root: str) -> list[str]:
    """The names of the classes as they are compared; two that become one are refused."""
    first_of: dict[str, str] = {}
    for name in names:
        try:
            text = as_text(name)
        except ValueError as error:
            raise ValueError(f"{root} {error}.") from error
        if text in first_of:
            raise ValueError(
                f"{root} has two classes {text!r}, {first_of[text]!a} and {name!a}, whose names differ only in spaces "
                "around or in how their characters are composed: rename one, or put all pictures in one folder."
            )
        first_of[text] = name
    return list(first_of)


def finished(settings: Settings, out: Location) -> bool:
    """Whether the place holds this very build; one with anything else in it is refused."""
    if out.folder is not None and out.folder.exists() and not out.folder.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder, which may be new.")
    names = set(out.sizes())
    if not names - {PARTS_FOLDER}:
        return False
    if SETTINGS_FILE not in names:
        if all(name.startswith(SETTINGS_FILE) and name.endswith(TEMPORARY) for name in names - {PARTS_FOLDER}):
            return False  # killed while it wrote its first file
        raise ValueError(
            f"--out {out} is not empty and was not begun by `bigtrain-shards build` (it holds {min(names)}): "
            "give a new or empty folder."
        )
    begun, asked = begun_with(out), settings.record
    differing = [name for name in asked if begun.get(name) != asked[name]]
    if differing:
        was = ", ".join(f"{name} {begun.get(name)!r}, not {asked[name]!r}" for name in differing)
        raise ValueError(
            f"--out {out} was begun with other settings ({was}): give the same ones to continue, "
            "or another --out, or delete the folder to start over."
        )
    return MANIFEST_FILE in names


def pack_all(
    settings: Settings, out: Location, about: About, samples: Iterator[Sample], workers: int, max_skipped: float
) -> list[Shard]:
    """Write every shard that is not there yet, and the index; returns the lines of the manifest."""
    shards: list[Shard] = []
    contents: list[NDArray[np.uint64]] = []
    skipped: list[dict[str, Any]] = []
    outside: list[str] = []
    in_a_row = 0
    allowed = max(1, int(max_skipped * about.total)) if max_skipped > 0 else 0
    there = out.sizes()
    tasks = blocks(settings, out, samples, there, set(out.sizes(PARTS_FOLDER)))
    progress = Progress(about.total)
    if tars := sum(name.endswith(".tar") for name in there):
        progress.say(f"{out}: continuing, {counted(tars, 'shard')} {'is' if tars == 1 else 'are'} there")
    try:
        with out.written(INDEX_FILE) as file, IndexWriter(file) as index:
            for part, is_new in in_order(
                write_shard, tasks, min(workers, -(-about.total // settings.samples_per_shard))
            ):
                if is_new:
                    save_part(out, part)
                if part.shard is not None:
                    index.add(part.rows, len(shards))
                    shards.append(part.shard)
                    contents.append(np.array([row["digest"] for row in part.rows], np.uint64))
                progress.add(part.samples, part.shard.bytes if part.shard else 0, is_new)
                for entry in part.skipped if is_new else ():
                    progress.say(f"skipped {entry['source'] or entry['key']}: {entry['reason']}")
                skipped += part.skipped
                outside += part.outside
                in_a_row = longest_run(part, in_a_row)
                if len(skipped) > allowed or in_a_row >= MAX_IN_A_ROW:
                    many = in_a_row >= MAX_IN_A_ROW
                    what = f"{in_a_row} pictures in a row" if many else f"{len(skipped)} of {about.total} pictures"
                    raise too_many(what, allowed, skipped[0], out)
            if not shards:
                raise ValueError(f"{settings.root} holds no picture that can be read: nothing to build.")
            index.close()
            twice = duplicates(out, file, np.concatenate(contents), shards)
            write_lines(out, DUPLICATES_FILE, [{"keys": group.keys} for group in twice])
    finally:
        progress.close()
        write_lines(out, SKIPPED_FILE, [{k: v for k, v in entry.items() if k != "position"} for entry in skipped])
    for name in set(out.sizes()) - {shard.file for shard in shards}:  # of an earlier run, when the dataset was larger
        if name.endswith(".tar"):
            out.remove(name)
    if skipped:
        unread = counted(len(skipped), "picture")
        print(f"{unread} could not be read; {out}/{SKIPPED_FILE} lists them with the reasons.", file=sys.stderr)
    if outside:
        print(outside_summary(outside), file=sys.stderr)
    if twice:
        print(duplicates_summary(twice, f"{out}/{DUPLICATES_FILE}"), file=sys.stderr)
    samples_written = sum(shard.samples for shard in shards)
    print(f"{out}: {contents_of(samples_written, len(shards), about.classes)}{progress.speed()}.")
    return shards


def too_many(what: str, allowed: int, first: dict[str, Any], out: Location) -> ValueError:
    return ValueError(
        f"{what} cannot be read, and at most {allowed} may be (or {MAX_IN_A_ROW - 1} in a row); the first is "
        f"{first['source'] or first['key']} ({first['reason']}). All are in {out}/{SKIPPED_FILE}: repair them, or "
        "allow more with --max-skipped, and run again."
    )


def contents_of(samples: int, shards: int, classes: Sequence[str]) -> str:
    """Samples, shards and classes of a set in numbers, and its first classes by name."""
    named = f" ({few(classes)})" if classes else ""
    return f"{counted(samples, 'sample')} in {counted(shards, 'shard')}, {counted(len(classes), 'class')}{named}"


def outside_summary(sources: Sequence[str]) -> str:
    have = "has a box" if len(sources) == 1 else "have boxes"
    said = f"{counted(len(sources), 'picture')} {have} wholly outside of it ({few(sources)})"
    return f"{said}: the class is kept, without the box."


def duplicates_summary(groups: Sequence[Equals], listing: str) -> str:
    more = sum(len(group.keys) - 1 for group in groups)
    have = "has" if more == 1 else "have"
    said = f"{counted(more, 'picture')} {have} the same bytes as another; all are kept, and {listing} names them."
    if differing := sum(len(group.labels) > 1 for group in groups):
        group = counted(differing, "group")
        said += f" In {group} of equal pictures the classes differ, so some of these labels are wrong."
    return said


def blocks(
    settings: Settings, out: Location, samples: Iterator[Sample], there: dict[str, int], parts: set[str]
) -> Iterator[Task | Done[Part]]:
    """The work, shard by shard; `there` are the files of an earlier run and their bytes, `parts` what it finished."""
    for number in itertools.count():
        block = list(itertools.islice(samples, settings.samples_per_shard))
        if not block:
            return
        part = load_part(out, number, block, there) if part_name(number) in parts else None
        yield Done(part) if part is not None else Task(out, number, block, settings.treatment)


def longest_run(part: Part, before: int) -> int:
    """Pictures skipped in a row at the part's end, or MAX_IN_A_ROW if it was reached on the way."""
    bad = {entry["position"] for entry in part.skipped}
    run = before
    for position in range(part.samples):
        run = run + 1 if position in bad else 0
        if run >= MAX_IN_A_ROW:
            return run
    return run


def write_lines(out: Location, name: str, records: list[dict[str, Any]]) -> None:
    """A JSON record a line; no records, no file."""
    if not records:
        out.remove(name)
        return
    with out.written(name) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def part_name(number: int) -> str:
    return f"{number:06d}.json"


def save_part(out: Location, part: Part) -> None:
    # if a power cut empties it, its shard is built again
    with out.written(f"{PARTS_FOLDER}/{part_name(part.number)}", "renamed") as file:
        shard = vars(part.shard) if part.shard else None
        file.write(json.dumps({**vars(part), "shard": shard}).encode())


def load_part(out: Location, number: int, samples: list[Sample], there: dict[str, int]) -> Part | None:
    """The part that an earlier run finished, if it is of the same samples and its tar is there too."""
    try:
        record = json.loads(out.read(f"{PARTS_FOLDER}/{part_name(number)}"))
        part = Part(**{**record, "shard": Shard(**record["shard"]) if record["shard"] else None})
    except (ValueError, TypeError, KeyError):
        return None  # by another version of this builder
    if part.skipped or part.fingerprint != fingerprint(samples):
        return None  # a picture may have been repaired, or the dataset has changed since: the shard is written again
    if part.shard is not None and there.get(shard_name(number)) != part.shard.bytes:
        return None
    return part
