"""One block of samples -> one tar: the same bytes for the same samples, in any process."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.data.schema import MASK_SUFFIX, Box, Object, Sample, Shard
from bigtrain.images import IMAGE_EXTENSIONS, UnreadableError, open_image
from bigtrain.retry import RetryPolicy, is_permanent, retried
from shards.location import Location
from shards.mask_codec import checked_mask
from shards.tar_writer import TarWriter
from shards.treatment import Treated, Treatment, checked, displayed_size

RETRY = RetryPolicy(attempts=4)
STORED_AS = {"jpe": "jpg", "jfif": "jpg"}  # names of JPEGs that readers of WebDataset do not know


class Task(NamedTuple):
    """Samples number * samples_per_shard and on, to go to one shard."""

    out: Location
    number: int
    samples: Sequence[Sample]
    treatment: Treatment


@dataclass(frozen=True)
class Part:
    """A finished shard: its line in the manifest, its rows of the index, and what was left out of it."""

    number: int
    samples: int  # taken from the adapter
    fingerprint: str  # a dataset that has changed is noticed
    shard: Shard | None  # None: not one of them could be read
    rows: list[dict[str, Any]]  # WRITTEN_SCHEMA without "shard"
    skipped: list[dict[str, Any]]  # position, key, source, reason
    outside: list[str]  # sources of the samples with a box of which nothing lies in the picture


def fingerprint(samples: Sequence[Sample]) -> str:
    """What a shard of them depends on: their labels and boxes, and their files' sizes and times, or their bytes."""
    digest = hashlib.sha256()
    for sample in samples:
        for part in (sample.key.encode(), sample.to_json(), state(sample.image), state(sample.mask)):
            digest.update(b"%d %b\n" % (len(part), part))
    return digest.hexdigest()


def state(content: Path | bytes | Callable[[], bytes] | None) -> bytes:
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    if isinstance(content, Path):
        try:
            found = content.stat()
            return b"%d %d" % (found.st_size, found.st_mtime_ns)
        except OSError:
            return b"-"
    return pickle.dumps(content)  # a generated picture depends on its arguments alone


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def write_shard(task: Task) -> Part:
    """Write the block's shard; pictures that cannot be read are left out and named."""
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    outside: list[str] = []
    name = shard_name(task.number)
    try:
        with task.out.written(name) as file, TarWriter(file) as tar:
            for position, sample in enumerate(task.samples):
                try:
                    picture, members, boxes_lost = prepare(sample, task.treatment)
                except UnreadableError as reason:
                    skipped.append(
                        {"position": position, "key": sample.key, "source": sample.source, "reason": str(reason)}
                    )
                    continue
                offset = tar.add(f"{sample.key}.{picture.ext}", picture.encoded, is_picture=True)
                for ext, data in members:
                    tar.add(f"{sample.key}.{ext}", data)
                rows.append(
                    {
                        "key": sample.key,
                        "image_offset": offset,
                        "image_size": len(picture.encoded),
                        "image_ext": picture.ext,
                        "width": picture.width,
                        "height": picture.height,
                        "classes": sample.classes,
                    }
                )
                if boxes_lost:
                    outside.append(sample.source or sample.key)
            tar.close()
            if not rows:
                raise NothingToWrite
        hashes = tar.hashes()
        for row, digest in zip(rows, hashes.pictures, strict=True):
            row["digest"] = digest
        shard = Shard(name, len(rows), tar.bytes, hashes.tar.hexdigest())
    except NothingToWrite:
        shard = None
    return Part(task.number, len(task.samples), fingerprint(task.samples), shard, rows, skipped, outside)


class NothingToWrite(Exception):  # noqa: N818
    """Not one picture of the block can be read, so there is no shard."""


class Prepared(NamedTuple):
    """What goes into a shard of a sample: its picture, its other members by their extension."""

    picture: Treated
    members: list[tuple[str, bytes]]
    boxes_lost: int  # of which nothing lies in the picture


def prepare(sample: Sample, treatment: Treatment) -> Prepared:
    """Raises UnreadableError: the sample cannot be used, and why."""
    if sample.image_ext not in IMAGE_EXTENSIONS:
        raise UnreadableError(f"unsupported: a .{sample.image_ext}; pictures may be {', '.join(IMAGE_EXTENSIONS)}")
    original = read_bytes(sample.image)
    picture = checked(original, sample.image_ext, treatment)
    size = original_size = (picture.width, picture.height)
    boxes_lost = 0
    if sample.mask is not None or any(thing.box for thing in sample.objects):
        if picture.encoded is not original:
            original_size = displayed_size(open_image(original), original)
        if sample.annotated_size not in (None, original_size) and any(thing.box for thing in sample.objects):
            raise UnreadableError(
                f"its annotation is of a picture of size {size_of(sample.annotated_size)}, and it is "
                f"{size_of(original_size)} as displayed, so its boxes do not fit"
            )
        objects = [placed(thing, original_size, size) for thing in sample.objects]
        boxes_lost = sum(
            was.box is not None and now.box is None for was, now in zip(sample.objects, objects, strict=True)
        )
        sample = replace(sample, objects=objects)
    members = [("json", sample.to_json())]
    if sample.mask is not None:
        try:
            mask = checked_mask(read_bytes(sample.mask), original_size, size)
        except UnreadableError as error:
            named = f" {sample.mask.name}" if isinstance(sample.mask, Path) else ""
            raise UnreadableError(f"its mask{named} {error}") from error
        members.append((MASK_SUFFIX, mask))
    return Prepared(picture._replace(ext=STORED_AS.get(picture.ext, picture.ext)), members, boxes_lost)


def size_of(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def read_bytes(image: Path | bytes | Callable[[], bytes]) -> bytes:
    """The bytes of a picture; a missing file is an UnreadableError, an error of the disk is retried."""
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Path):
        return image()
    try:
        if image.exists() and not image.is_file():
            raise UnreadableError("not a picture: it is no plain file")  # reading a pipe would wait for ever
        return retried(image.read_bytes, RETRY)
    except OSError as error:
        if is_permanent(error):
            raise UnreadableError(f"{type(error).__name__}: {error.strerror}") from error
        raise OSError(
            error.errno,
            f"{image} cannot be read (tried {RETRY.attempts} times, {error.strerror}): check its disk, and run the "
            "same command again; the build continues.",
        ) from error


def placed(thing: Object, original: tuple[int, int], size: tuple[int, int]) -> Object:
    """An object with its box cut to the picture, in the pixels of its new size; without one if nothing is left of it.

    Annotations of published data sets do reach beyond their pictures.
    """
    if thing.box is None:
        return thing
    width, height = original
    top, bottom = (min(max(edge, 0), height) for edge in (thing.box.top, thing.box.bottom))
    left, right = (min(max(edge, 0), width) for edge in (thing.box.left, thing.box.right))
    if top >= bottom or left >= right:
        return replace(thing, box=None)
    if size == original:
        return replace(thing, box=Box(top, left, bottom, right))
    down, across = size[1] / height, size[0] / width
    return replace(thing, box=Box(*(round(v, 3) for v in (top * down, left * across, bottom * down, right * across))))
