"""COCO's instances: one sample an image, with a box for every annotated object, crowds among them.

An image without annotation has no objects. Every category is a class of the set, shown or not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.data.schema import Box, Object, Sample
from shards.adapters.about import About
from shards.adapters.folder import extension
from shards.names import inside

LAYOUT = "the folder of annotations/instances_<split>.json and of the pictures in <split>/ or images/<split>/"
LICENCE = "annotations CC BY 4.0; pictures under the Flickr terms of their owners"


def about(root: Path, split: str) -> About:
    record = read_instances(root, split)
    folder_of_pictures(root, split)
    return About("coco", [c["name"] for c in record["categories"]], LICENCE, len(record["images"]))


def samples(root: Path, split: str) -> Iterator[Sample]:
    """Yield the images in order of file name."""
    record = read_instances(root, split)
    pictures = folder_of_pictures(root, split)
    names = {c["id"]: c["name"] for c in record["categories"]}
    objects: dict[int, list[Object]] = {}
    for annotation in record["annotations"]:
        if annotation["category_id"] not in names:
            raise ValueError(
                f"annotation {annotation.get('id')} of instances_{split}.json has category "
                f"{annotation['category_id']}, which the file does not name: get it from its owners."
            )
        found = Object(names[annotation["category_id"]], half_open(annotation["bbox"]))
        objects.setdefault(annotation["image_id"], []).append(found)
    for image in sorted(record["images"], key=lambda image: image["file_name"]):
        path = inside(pictures, image["file_name"])
        yield Sample(
            key=f"{split}/{Path(image['file_name']).with_suffix('').as_posix()}",
            image=path,
            image_ext=extension(path),
            objects=objects.get(image["id"], []),
            source=path.relative_to(root).as_posix(),
        )


def half_open(bbox: list[float]) -> Box:
    """COCO's (left, top, width, height), to its own two decimals."""
    left, top, width, height = bbox
    return Box(top=round(top, 2), left=round(left, 2), bottom=round(top + height, 2), right=round(left + width, 2))


@functools.lru_cache(maxsize=1)
def read_instances(root: Path, split: str) -> dict[str, Any]:
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        there = sorted(p.stem.removeprefix("instances_") for p in path.parent.glob("instances_*.json"))
        what = f"--split may be {' or '.join(there)}" if there else f"--root must be {LAYOUT}"
        raise FileNotFoundError(f"{path} is missing: {what}.")
    try:
        record = json.loads(path.read_bytes())
        parts = {name: list(record[name]) for name in ("images", "annotations", "categories")}
        needed = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id", "bbox")}
        for name, fields in {**needed, "categories": ("id", "name")}.items():
            for item in parts[name]:
                _ = [item[field] for field in fields]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no instances file of COCO ({error!r}): get it from its owners.") from error
    return parts


def folder_of_pictures(root: Path, split: str) -> Path:
    for folder in (root / split, root / "images" / split):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{root / split} is missing: --root must be {LAYOUT}.")
