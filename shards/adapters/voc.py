"""Pascal VOC 2007 and 2012: one sample an image, with a box for every object annotated in it, difficult ones too."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser, fromstring

from bigtrain.data.schema import Box, Object, Sample
from bigtrain.files import read_lines
from shards.adapters.about import About
from shards.adapters.folder import files_in
from shards.adapters.lists import compare, warn
from shards.keys import inside

LAYOUT = (
    "the folder VOC2007 or VOC2012, with ImageSets/, JPEGImages/ and Annotations/ in it, or VOCdevkit with one of them"
)
LICENCE = "pictures under the Flickr terms of their owners"
CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "--image-set": {
        "choices": ["Main", "Segmentation"],
        "default": "Main",
        "help": "whose list to follow; Segmentation adds SegmentationClass/ as masks (default: Main)",
    }
}


def about(root: Path, split: str, image_set: str = "Main") -> About:
    root = year_folder(root)
    found = read(root, split, image_set)
    pictures = root / "JPEGImages"
    compare([s.source.partition("/")[2] for s in found], files_in(pictures), f"{split}.txt", pictures, is_whole=False)
    without = [s.key for s in found if not s.objects and not annotation_of(root, s.key).is_file()]
    if without:
        warn(f"{len(without)} of {len(found)} images, {without[0]} for one, have no annotation: they show no class.")
    extra = {name for sample in found for name in sample.classes} - set(CLASSES)
    year = root.resolve().name.lower()
    name = year if year in ("voc2007", "voc2012") else "voc"
    return About(name, CLASSES + sorted(extra), LICENCE, len(found))


def samples(root: Path, split: str, image_set: str = "Main") -> Iterator[Sample]:
    """Yield the images of ImageSets/<image_set>/<split>.txt in order of id."""
    yield from read(year_folder(root), split, image_set)


@functools.lru_cache(maxsize=1)
def read(root: Path, split: str, image_set: str) -> list[Sample]:
    return [
        Sample(
            key=image_id,
            image=inside(root / "JPEGImages", f"{image_id}.jpg"),
            image_ext="jpg",
            objects=objects_of(root, split, image_id),
            annotated_size=stated_size(annotation_of(root, image_id)),
            source=f"JPEGImages/{image_id}.jpg",
            mask=mask_of(root, split, image_id) if image_set == "Segmentation" else None,
        )
        for image_id in listed_ids(root, split, image_set)
    ]


def year_folder(root: Path) -> Path:
    """The folder VOC2007 or VOC2012, where the root is that or VOCdevkit, or holds VOCdevkit."""
    if (root / "ImageSets").is_dir():
        return root
    years = sorted(
        path.parent for pattern in ("VOC20*", "VOCdevkit/VOC20*") for path in root.glob(f"{pattern}/ImageSets")
    )
    if len(years) == 1:
        return years[0]
    what = f"it may be {' or '.join(map(str, years))}" if years else f"it must be {LAYOUT}"
    raise FileNotFoundError(f"--root {root} holds no ImageSets/: {what}.")


def listed_ids(root: Path, split: str, image_set: str) -> list[str]:
    listing = root / "ImageSets" / image_set / f"{split}.txt"
    there = sorted(path.stem for path in listing.parent.glob("*.txt") if "_" not in path.stem)
    if not listing.is_file():
        what = f"--split may be {', '.join(there)}" if there else f"--root must be {LAYOUT}"
        raise FileNotFoundError(f"{listing} is missing: {what}.")
    lines = read_lines(listing)
    if lines and all(re.search(r"\s-?[01]$", line) for line in lines):
        raise ValueError(
            f"{listing} says of each image whether it shows one class, which its annotation says too: "
            f"give a list of images, so --split may be {', '.join(there)}."
        )
    return sorted(set(lines))


def annotation_of(root: Path, image_id: str) -> Path:
    return inside(root / "Annotations", f"{image_id}.xml")


def objects_of(root: Path, split: str, image_id: str) -> list[Object]:
    """The objects of an image; the owners keep those of some test images to themselves."""
    path = annotation_of(root, image_id)
    if path.is_file():
        return objects_in(path)
    if split == "test":
        return []
    raise FileNotFoundError(f"{path} is missing, and {split}.txt names {image_id}: --root must be {LAYOUT}.")


def mask_of(root: Path, split: str, image_id: str) -> Path | None:
    """The classes of an image's pixels; those of test are kept like its objects."""
    path = inside(root / "SegmentationClass", f"{image_id}.png")
    if path.is_file():
        return path
    if split == "test":
        return None
    raise FileNotFoundError(f"{path} is missing, and Segmentation/{split}.txt names {image_id}: get it too.")


def stated_size(path: Path) -> tuple[int, int] | None:
    """Width and height in which an image was annotated; some annotations leave them out, or say 0."""
    size = parsed(path).find("size") if path.is_file() else None
    try:
        width, height = (
            (int(float(size.findtext(side, "0"))) for side in ("width", "height")) if size is not None else (0, 0)
        )
    except (ValueError, OverflowError):
        return None
    return (width, height) if min(width, height) > 0 else None


def objects_in(path: Path) -> list[Object]:
    """The <object>s of an annotation; parts of a person are left out."""
    found = []
    for thing in parsed(path).findall("object"):
        name = thing.findtext("name", "").strip()
        if not name:
            raise ValueError(f"{path} has an object without a name: correct it.")
        try:
            box = half_open(*(float(thing.findtext(f"bndbox/{side}", "")) for side in ("ymin", "xmin", "ymax", "xmax")))
        except ValueError as error:
            raise ValueError(f"{path} has an object {name!r} without the four numbers of a box: correct it.") from error
        found.append(Object(name, box))
    return found


def half_open(ymin: float, xmin: float, ymax: float, xmax: float) -> Box:
    """VOC counts pixels from 1 and its last row and column belong to the box; a few boxes of ImageNet name the last
    first.
    """
    if not math.isfinite(ymin + xmin + ymax + xmax):
        raise ValueError("no box")
    (top, bottom), (left, right) = sorted((ymin, ymax)), sorted((xmin, xmax))
    return Box(top=top - 1, left=left - 1, bottom=bottom, right=right)


def parsed(path: Path) -> Element:
    """Parse an annotation."""
    try:
        return fromstring(path.read_bytes(), XMLParser(target=PlainTree()))
    except (ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path} cannot be read as XML ({error}): get it from its owners.") from error


class PlainTree(TreeBuilder):
    """Refuses a document type, and with it every entity."""

    def doctype(self, *_: object) -> None:
        raise ValueError("it declares a document type, which no annotation of VOC does")
