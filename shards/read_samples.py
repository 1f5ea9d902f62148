"""Whole samples of a set: the picture that the index points to, and its json and mask, which lie near it."""

from __future__ import annotations

import io
import json
import math
import tarfile
from dataclasses import dataclass, field
from typing import Any

import fsspec

from bigtrain.data.schema import MASK_SUFFIX, Manifest
from shards.members import Member, members

BLOCK = tarfile.BLOCKSIZE
BEFORE = 128 * BLOCK  # in others' shards the json may lie before the picture
BEHIND = 128 * BLOCK
MAX_MEMBER = 64 << 20  # bytes of a json or mask that is read


@dataclass
class Found:
    """The bytes of one sample; the notes say what could not be read."""

    picture: bytes = b""
    json: bytes | None = None
    mask: bytes | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Drawing:
    """What a sample's json says to a page."""

    source: str = ""
    boxes: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, text: bytes | None) -> Drawing:
        """Read it; the json of others' shards may be of any form, and gives what it has."""
        drawing = cls()
        if text is None:
            return drawing
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            drawing.notes.append(f"its json cannot be read: {type(error).__name__}")
            return drawing
        if not isinstance(record, dict):
            return drawing
        drawing.source = str(record.get("source") or "")
        boxes = record.get("boxes")
        for box in boxes if isinstance(boxes, list) else []:
            if is_box(box):
                drawing.boxes.append((*(float(side) for side in box[:4]), box[4]))
        if isinstance(boxes, list) and len(drawing.boxes) < len(boxes):
            wrong = len(boxes) - len(drawing.boxes)
            drawing.notes.append(f"{wrong} of {len(boxes)} boxes are no [top, left, bottom, right, class]")
        return drawing


def is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 5
        and isinstance(box[4], str)
        and all(type(side) in (int, float) and abs(side) < 1e9 and math.isfinite(side) for side in box[:4])
    )


def read_neighbours(
    fs: fsspec.AbstractFileSystem, folder: str, manifest: Manifest, rows: list[dict[str, Any]]
) -> list[Found]:
    """Read the samples of some rows of the index, each as one range around its picture."""
    shards = [manifest.shards[row["shard"]] for row in rows]
    paths = [f"{folder}/{shard.file}" for shard in shards]
    begins = [max(0, row["image_offset"] - BEFORE) // BLOCK * BLOCK for row in rows]
    ends = [
        min(row["image_offset"] + row["image_size"] + BEHIND, shard.bytes)
        for row, shard in zip(rows, shards, strict=True)
    ]
    ranges = fs.cat_ranges(paths, begins, ends, on_error="return")
    found = []
    for row, path, begin, data in zip(rows, paths, begins, ranges, strict=True):
        if isinstance(data, BaseException):
            found.append(Found(notes=[f"{path.rsplit('/', 1)[-1]} cannot be read: {data or type(data).__name__}"]))
            continue
        found.append(sample(fs, path, row, begin, data))
    return found


def sample(fs: fsspec.AbstractFileSystem, path: str, row: dict[str, Any], begin: int, data: bytes) -> Found:
    at = row["image_offset"] - begin
    found = Found(picture=data[at : at + row["image_size"]])
    if len(found.picture) < row["image_size"]:
        found.notes.append(f"{path.rsplit('/', 1)[-1]} ends before the picture does")
        return found
    for member in members_around(data, at):
        if member.key != row["key"] or member.ext not in ("json", MASK_SUFFIX):
            continue
        content = data[member.offset : member.offset + member.size]
        if len(content) < member.size <= MAX_MEMBER:
            start = begin + member.offset
            try:
                content = fs.cat_file(path, start=start, end=start + member.size)
            except Exception as error:  # each file system has errors of its own
                found.notes.append(f"its {member.ext} cannot be read: {error or type(error).__name__}")
                continue
        if len(content) < member.size:
            found.notes.append(f"its {member.ext} of {member.size} bytes cannot be read")
        elif member.ext == "json":
            found.json = content
        else:
            found.mask = content
    return found


def members_around(data: bytes, picture_at: int) -> list[Member]:
    """The members in a piece of a tar, from the first header whose chain reaches the picture's."""
    for start in range(0, picture_at, BLOCK):
        if data[start + 257 : start + 262] != b"ustar" and start != picture_at - BLOCK:
            continue
        file = io.BytesIO(data)
        file.seek(start)
        around: list[Member] = []
        try:
            for member in members(file):
                around.append(member)
        except tarfile.TarError:
            pass  # the piece ends inside a member
        if any(member.offset == picture_at for member in around):
            return around
    return []
