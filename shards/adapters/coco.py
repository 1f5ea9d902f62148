"""COCO's instances, 2014 and 2017: one sample an image, with a box for every annotated object, crowds among them.

An image without annotation has no objects. Every category is a class of the set, shown or not. A box without area is
no box, but its class is shown. The splits test2017, test-dev2017, unlabeled2017 ... have no annotations at all.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.data.schema import Box, Object, Sample
from shards.adapters.about import About
from shards.adapters.folder import extension, files_in, stem
from shards.adapters.lists import compare, warn
from shards.keys import inside

LAYOUT = "the folder of annotations/instances_<split>.json and of the pictures in <split>/ or images/<split>/"
LICENCE = "annotations CC BY 4.0; pictures under the Flickr terms of their owners"
PICTURES_OF = {  # lists that share the pictures of another split
    "minival2014": "val2014",
    "valminusminival2014": "val2014",
    "test-dev2015": "test2015",
    "test-dev2017": "test2017",
}


class Instances(NamedTuple):
    """What a list says: the classes in its order, the images as (file name, objects, size) in order of name."""

    classes: list[str]
    images: list[tuple[str, list[Object], tuple[int, int] | None]]
    unlabelled: bool  # the list holds no annotations
    without_area: list[Any]  # ids of annotations whose box has none


def about(root: Path, split: str) -> About:
    listing = listing_of(root, split)
    found = read(listing)
    names = [name for name, *_ in found.images]
    pictures = folder_of_pictures(root, split)
    for name in names:
        inside(pictures, name)
    compare(names, files_in(pictures), listing.name, pictures, is_whole=split not in PICTURES_OF)
    if found.unlabelled:
        warn(f"{listing.name} has no annotations: the pictures of {split} show no class.")
    if found.without_area:
        warn(
            f"{len(found.without_area)} annotations of {listing.name}, {found.without_area[0]} for one, have a box "
            "without area: their pictures keep the class, without a box."
        )
    return About("coco", found.classes, LICENCE, len(names))


def samples(root: Path, split: str) -> Iterator[Sample]:
    """Yield the images in order of file name."""
    pictures = folder_of_pictures(root, split)
    for name, objects, size in read(listing_of(root, split)).images:
        path = inside(pictures, name)
        yield Sample(
            key=f"{split}/{stem(name)}",
            image=path,
            image_ext=extension(path),
            objects=objects,
            source=path.relative_to(root).as_posix(),
            annotated_size=size,
        )


def half_open(bbox: list[float]) -> Box:
    """COCO's (left, top, width, height), to its own two decimals."""
    left, top, width, height = (float(number) for number in bbox)
    if not (math.isfinite(left + top + width + height) and width >= 0 and height >= 0):
        raise ValueError(f"{bbox} is no box (left, top, width, height)")
    return Box(top=round(top, 2), left=round(left, 2), bottom=round(top + height, 2), right=round(left + width, 2))


def stated_size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Width and height in which an image was annotated; some lists leave them out, or say 0."""
    size = (int(image.get("width") or 0), int(image.get("height") or 0))
    return size if min(size) > 0 else None


def listing_of(root: Path, split: str) -> Path:
    """instances_<split>.json, or image_info_<split>.json of a split without annotations."""
    folder = root / "annotations"
    for kind in ("instances", "image_info"):
        if (path := folder / f"{kind}_{split}.json").is_file():
            return path
    there = sorted(p.stem.removeprefix("instances_") for p in folder.glob("instances_*.json"))
    if there:
        what = f"--split may be {' or '.join(there)}"
    elif (root.parent / "annotations").is_dir():
        what = f"--root must be {LAYOUT}: it seems to be {root.parent}"
    else:
        what = f"--root must be {LAYOUT}"
    raise FileNotFoundError(f"{folder / f'instances_{split}.json'} is missing: {what}.")


@functools.lru_cache(maxsize=1)
def read(listing: Path) -> Instances:
    """Read a list; one that contradicts itself is refused, with the place."""
    is_labelled = listing.name.startswith("instances_")
    try:
        record = json.loads(listing.read_bytes())
        class_of = {int(category["id"]): str(category["name"]) for category in record["categories"]}
        images = [
            (int(image["id"]), str(image["file_name"]).replace("\\", "/"), stated_size(image))
            for image in record["images"]
        ]
        annotations = [
            (a.get("id"), int(a["image_id"]), int(a["category_id"]), half_open(a["bbox"]))
            for a in (record["annotations"] if is_labelled else [])
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{listing} is no list of COCO ({what}): get it from its owners.") from error
    for times in (Counter(number for number, *_ in images), Counter(stem(name) for _, name, _ in images)):
        for image, count in times.most_common(1):
            if count > 1:
                raise ValueError(f"{listing} lists the image {image} {count} times: get it from its owners.")
    objects: dict[int, list[Object]] = {number: [] for number, *_ in images}
    without_area = []
    for number, image, category, box in annotations:
        for kind, its_id, known in (("category", category, class_of), ("image", image, objects)):
            if its_id not in known:
                raise ValueError(
                    f"annotation {number} of {listing} is of {kind} {its_id}, which the file does not list: "
                    "get it from its owners."
                )
        has_area = box.top < box.bottom and box.left < box.right
        objects[image].append(Object(class_of[category], box if has_area else None))
        if not has_area:
            without_area.append(number)
    by_name = sorted(((name, objects[number], size) for number, name, size in images), key=lambda image: image[0])
    return Instances(list(dict.fromkeys(class_of.values())), by_name, not is_labelled, without_area)


def folder_of_pictures(root: Path, split: str) -> Path:
    name = PICTURES_OF.get(split, split)
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{root / name} is missing: --root must be {LAYOUT}.")
