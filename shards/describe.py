"""Index and manifest for WebDataset shards that others made; the tars stay as they are."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest, Shard
from shards.build import SKIPPED_FILE, table_of, write_skipped
from shards.durable import written_whole
from shards.members import Member, members
from shards.pictures import UnreadableError, read_size
from shards.progress import Progress

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard", b"\x04\x22": "lz4"}
LABEL_EXTENSIONS = ("json", "cls", "txt")  # the first that a sample has
MAX_NAME = 200  # characters; a longer .txt is a caption
MAX_NAMED = 10


@dataclass
class Found:
    """What one pass over all tars finds."""

    shards: list[Shard] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    place_of: dict[str, str] = field(default_factory=dict)  # key -> tar
    classes: set[str] = field(default_factory=set)


def describe(
    folder: Path,
    class_names: Sequence[str] | None = None,
    name: str | None = None,
    split: str = "train",
    licence: str = "unknown",
    max_skipped: float = 0.01,
) -> Manifest:
    """Write index.parquet, then manifest.json; samples that cannot be understood are named, and nothing is written."""
    tars = tars_in(folder)
    progress = Progress(0)
    found = Found()
    for tar in tars:
        read_shard(tar, class_names, found, progress)
    progress.close()
    if found.classes and found.unlabelled:
        first = ", ".join(found.unlabelled[:3])
        found.wrong.append(f"{len(found.unlabelled)} samples have no class and others have one ({first} ...)")
    if found.wrong:
        more = len(found.wrong) - MAX_NAMED
        listed = "; ".join(found.wrong[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"{folder} cannot be indexed as it is: {listed}. Nothing was written.")
    samples = sum(shard.samples for shard in found.shards)
    allowed = max(1, int(max_skipped * (samples + len(found.skipped)))) if max_skipped > 0 else 0
    if len(found.skipped) > allowed or not samples:
        first = "".join(f"; the first is {s['source']} ({s['reason']})" for s in found.skipped[:1])
        raise ValueError(
            f"{len(found.skipped)} of {samples + len(found.skipped)} pictures in {folder} cannot be read, and "
            f"{allowed} are allowed{first}. Nothing was written: make the shards anew, or raise --max-skipped."
        )
    write_skipped(folder, found.skipped)
    with written_whole(folder / INDEX_FILE) as file:
        pq.write_table(pa.concat_tables(found.tables), file, row_group_size=65536)
    classes = tuple(class_names) if class_names else tuple(sorted(found.classes, key=numbers_first))
    manifest = Manifest(name or folder.resolve().name, split, classes, licence, tuple(found.shards))
    with written_whole(folder / MANIFEST_FILE) as file:
        file.write(manifest.to_json().encode())
    print(f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards, {len(classes)} classes.")
    if found.skipped:
        print(f"{len(found.skipped)} pictures cannot be read; they are named in {folder / SKIPPED_FILE}.")
    return manifest


def tars_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the folder of the .tar files.")
    if (folder / MANIFEST_FILE).exists():
        raise ValueError(f"{folder} has a {MANIFEST_FILE} already: delete it first if it is to be made anew.")
    packed = sorted(
        p.name for p in folder.iterdir() if p.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
    )
    if packed:
        raise ValueError(
            f"{folder / packed[0]} is compressed, so no picture can be read by its offset: unpack to .tar."
        )
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(f"{folder} has no .tar files: give the folder of WebDataset shards.")
    for tar in tars:
        with tar.open("rb") as file:
            if kind := COMPRESSED.get(file.read(2)):
                raise ValueError(
                    f"{tar} is compressed with {kind}, so no picture can be read by its offset: unpack it."
                )
    return tars


def read_shard(tar: Path, class_names: Sequence[str] | None, found: Found, progress: Progress) -> None:
    rows: list[dict[str, Any]] = []
    try:
        with tar.open("rb") as file, tar.open("rb") as reading:
            for key, group in itertools.groupby(members(file), key=lambda member: member.key):
                if key in found.place_of:
                    how = (
                        "its members lie apart" if found.place_of[key] == tar.name else f"also in {found.place_of[key]}"
                    )
                    found.wrong.append(f"{tar.name}: the key {key!r} comes again ({how})")
                    continue
                found.place_of[key] = tar.name
                row = read_sample(tar.name, key, list(group), reading, class_names, found)
                if row is not None:
                    rows.append(row)
                progress.add(1)
    except tarfile.TarError as error:
        raise ValueError(f"{tar} is no whole tar ({error}): get it again. Nothing was written.") from error
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found.tables.append(table_of(rows, len(found.shards)))
    found.shards.append(Shard(tar.name, len(rows), tar.stat().st_size, digest))


def read_sample(
    tar: str, key: str, group: list[Member], file: IO[bytes], class_names: Sequence[str] | None, found: Found
) -> dict[str, Any] | None:
    """The sample's row of the index; what is wrong with it goes into `found`."""

    def read(member: Member) -> bytes:
        file.seek(member.offset)
        return file.read(member.size)

    pictures = [member for member in group if member.is_image]
    if len(pictures) != 1 or len({member.ext for member in group}) != len(group):
        names = ", ".join(member.ext for member in group)
        found.wrong.append(f"{tar}: {key} has {len(pictures)} pictures among its members ({names}), and needs one")
        return None
    picture = pictures[0]
    labels = {member.ext.lower(): member for member in group if member.ext.lower() in LABEL_EXTENSIONS}
    classes: list[str] = []
    try:
        for ext in LABEL_EXTENSIONS:
            if ext == "txt" and "json" in labels:  # beside a .json, a .txt is a caption
                break
            if ext in labels and (classes := classes_of(ext, read(labels[ext]), class_names)):
                break
    except ValueError as error:
        found.wrong.append(f"{tar}: {key}.{ext}: {error}")
        return None
    try:
        width, height = read_size(read(picture))
    except UnreadableError as reason:
        found.skipped.append({"key": key, "source": f"{tar}:{picture.name}", "reason": str(reason)})
        return None
    if not classes:
        found.unlabelled.append(f"{tar}: {key}")
    found.classes.update(classes)
    return {
        "key": key,
        "image_offset": picture.offset,
        "image_size": picture.size,
        "image_ext": picture.ext.lower(),
        "width": width,
        "height": height,
        "classes": classes,
    }


def classes_of(ext: str, data: bytes, class_names: Sequence[str] | None) -> list[str]:
    """Class names in a .json ("classes", "label" or "class"), .cls or .txt; numbers count in class_names from 0."""
    if ext == "json":
        record = json.loads(data)
        field_of = next(
            (name for name in ("classes", "label", "class") if isinstance(record, dict) and name in record), None
        )
        value = record[field_of] if field_of else []
        values = value if isinstance(value, list) else [value]
    else:
        text = data.decode("utf-8").strip()
        if "\n" in text or len(text) > MAX_NAME:
            raise ValueError("holds a longer text than the name of a class")
        values = [int(text)] if text.isdecimal() else [text] if text else []
    names = set()
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"has the class {value!r}, which is neither a name nor a whole number")
        if isinstance(value, int) and class_names is not None:
            if not 0 <= value < len(class_names):
                raise ValueError(f"has class {value}, and --class-names names 0 .. {len(class_names) - 1}")
            value = class_names[value]
        elif isinstance(value, str) and class_names is not None and value not in class_names:
            raise ValueError(f"has class {value!r}, which --class-names does not name")
        names.add(str(value))
    return sorted(names)


def numbers_first(name: str) -> tuple[int, str]:
    """Sort 2 before 10, and numbers before names."""
    return (int(name), "") if name.isdecimal() else (1 << 62, name)


def read_class_names(path: Path) -> list[str]:
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--class-names {path} must give each class a line of its own, no name twice.")
    return names
