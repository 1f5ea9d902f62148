"""One tar that others made -> its rows of the index, and what is wrong with it, in one read from start to end."""

from __future__ import annotations

import itertools
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bigtrain.data.schema import Shard
from bigtrain.images import UnreadableError
from shards.duplicates import content_digest
from shards.labels import CLASSES_FROM, LABEL_EXTENSIONS, MAX_LABEL_BYTES, class_of_folder, classes_of
from shards.location import Location
from shards.members import Digested, Member, RefusedError, members
from shards.treatment import Treatment, checked

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard", b"\x04\x22": "lz4"}
MAX_NAMED = 10
MAX_SHOWN = 2  # whether there is another is all that is asked


class Task(NamedTuple):
    shards: Location
    file: str
    class_names: Sequence[str] | None
    classes_from: str = CLASSES_FROM[0]


@dataclass
class Survey:
    """What one tar holds."""

    shard: Shard
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    pickled: Counter[str] = field(default_factory=Counter)  # extension -> members that are not opened
    classes: set[str] = field(default_factory=set)
    of_texts: int = 0  # samples whose class comes from a .txt
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> members that are no sample's
    shown: set[tuple[str, ...]] = field(
        default_factory=set
    )  # the classes that a sample shows together, MAX_SHOWN of them at most


def survey(task: Task) -> Survey:
    found = Survey(Shard(task.file, 0, 0, ""))
    keys: set[str] = set()
    try:
        with task.shards.opened(task.file) as raw:
            file = Digested(raw)
            if kind := COMPRESSED.get(file.read(2)):
                raise ValueError(
                    f"{task.shards}/{task.file} is compressed with {kind}, so no picture can be read by its offset: "
                    "unpack it."
                )
            file.seek(0)
            for key, group in itertools.groupby(contents(task, file, found), key=lambda entry: entry[0].key):
                entries = list(group)
                if key in keys:
                    found.wrong.append(f"{task.file}: the key {key!r} comes again (its members lie apart)")
                    continue
                keys.add(key)
                row = read_sample(task, key, entries, found)
                if row is not None:
                    found.rows.append(row)
            file.finish()
    except RefusedError as error:
        raise ValueError(f"{task.shards}/{task.file} is refused: {error}. Nothing was written.") from error
    except tarfile.TarError as error:
        raise ValueError(
            f"{task.shards}/{task.file} is not a whole tar ({error}): get it again. Nothing was written."
        ) from error
    found.shard = Shard(task.file, len(found.rows), file.bytes, file.sha256.hexdigest())
    return found


def contents(task: Task, file: Digested, found: Survey) -> Iterator[tuple[Member, bytes]]:
    """The members, and the bytes of pictures and labels as they pass by; what is pickled is never opened."""
    for member in members(file, found.left_out):
        if member.is_pickle:
            found.pickled[member.ext.lower().rsplit(".", 1)[-1]] += 1
            continue
        data = b""
        is_label = member.ext.lower() in LABEL_EXTENSIONS and task.classes_from == CLASSES_FROM[0]
        if member.is_image or member.may_be_image or is_label:
            if is_label and member.size > MAX_LABEL_BYTES:
                found.wrong.append(f"{found.shard.file}: {member.name} has {member.size} bytes, too many for a label")
            else:
                file.seek(member.offset)
                data = file.read(member.size)
        yield member, data


def read_sample(task: Task, key: str, entries: list[tuple[Member, bytes]], found: Survey) -> dict[str, Any] | None:
    """The sample's row of the index; what is wrong with it goes into `found`."""
    group = [member for member, _ in entries]
    pictures = [(member, data) for member, data in entries if member.is_image]
    pictures = pictures or [(member, data) for member, data in entries if member.may_be_image]
    if not pictures and re.fullmatch("__.*__", key):
        found.left_out["named __...__"] += len(entries)
        return None
    if len(pictures) != 1 or len({member.ext for member in group}) != len(group):
        names = ", ".join(member.ext for member in group)
        found.wrong.append(
            f"{task.file}: {key} has {len(pictures)} pictures among its members ({names}), and needs one"
        )
        return None
    picture, encoded = pictures[0]
    labels = {member.ext.lower(): data for member, data in entries if member.ext.lower() in LABEL_EXTENSIONS}
    if "json" in labels:  # beside a .json, a .txt is a caption
        labels.pop("txt", None)
    classes, label = list[str](), key
    try:
        if task.classes_from == "folder":
            classes = class_of_folder(key, task.class_names)
        else:
            for ext in (ext for ext in LABEL_EXTENSIONS if ext in labels):
                label = f"{key}.{ext}"
                if classes := classes_of(ext, labels[ext], task.class_names):
                    break
    except ValueError as error:
        found.wrong.append(f"{task.file}: {label}: {error}")
        return None
    try:
        whole = checked(encoded, picture.ext, Treatment())
    except UnreadableError as reason:
        found.skipped.append({"key": key, "source": f"{task.file}:{picture.name}", "reason": str(reason)})
        return None
    if not classes:
        found.unlabelled.append(f"{task.file}: {key}")
    elif label == f"{key}.txt":
        found.of_texts += 1
    found.classes.update(classes)
    if len(found.shown) < MAX_SHOWN:
        found.shown.add(tuple(classes))
    return {
        "key": key,
        "image_offset": picture.offset,
        "image_size": picture.size,
        "image_ext": picture.ext.lower().rsplit(".", 1)[-1],
        "width": whole.width,
        "height": whole.height,
        "classes": classes,
        "digest": content_digest(encoded),
    }
