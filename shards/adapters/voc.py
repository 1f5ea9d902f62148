"""Pascal VOC 2007 and 2012: one sample an image, with a box for every object annotated in it, difficult ones too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from bigtrain.data.schema import Box, Object, Sample
from shards.adapters.about import About
from shards.names import inside

LAYOUT = "the folder VOC2007 or VOC2012, with ImageSets/, JPEGImages/ and Annotations/ in it"
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
    ids = listed_ids(root, split, image_set)
    extra = {thing.class_name for image_id in ids for thing in objects_of(root, split, image_id)} - set(CLASSES)
    year = root.resolve().name.lower()
    name = year if year in ("voc2007", "voc2012") else "voc"
    return About(name, CLASSES + sorted(extra), LICENCE, len(ids))


def samples(root: Path, split: str, image_set: str = "Main") -> Iterator[Sample]:
    """Yield the images of ImageSets/<image_set>/<split>.txt in order of id."""
    for image_id in listed_ids(root, split, image_set):
        yield Sample(
            key=image_id,
            image=inside(root / "JPEGImages", f"{image_id}.jpg"),
            image_ext="jpg",
            objects=objects_of(root, split, image_id),
            source=f"JPEGImages/{image_id}.jpg",
            mask=inside(root / "SegmentationClass", f"{image_id}.png") if image_set == "Segmentation" else None,
        )


def listed_ids(root: Path, split: str, image_set: str) -> list[str]:
    listing = root / "ImageSets" / image_set / f"{split}.txt"
    if listing.is_file():
        lines = (line.split() for line in listing.read_text().splitlines())
        return sorted({fields[0] for fields in lines if fields})
    inner = next(root.glob("**/VOC20*/ImageSets"), None)
    if inner is not None:
        what = f"it seems to be {inner.parent}"
    elif listing.parent.is_dir():
        there = sorted(path.stem for path in listing.parent.glob("*.txt") if "_" not in path.stem)
        what = f"--split may be {', '.join(there)}"
    else:
        what = f"it must be {LAYOUT}"
    raise FileNotFoundError(f"{listing} is missing from --root: {what}.")


def objects_of(root: Path, split: str, image_id: str) -> list[Object]:
    """The objects of an image; the owners keep those of some test images to themselves."""
    path = inside(root / "Annotations", f"{image_id}.xml")
    if not path.is_file():
        if split == "test":
            return []
        raise FileNotFoundError(f"{path} is missing: --root must be {LAYOUT}.")
    return objects_in(path)


def objects_in(path: Path) -> list[Object]:
    """The <object>s of an annotation; parts of a person are none."""
    found = []
    for thing in parsed(path).findall("object"):
        name = thing.findtext("name", "").strip()
        try:
            corners = [float(thing.findtext(f"bndbox/{side}", "")) for side in ("ymin", "xmin", "ymax", "xmax")]
        except ValueError as error:
            raise ValueError(f"{path} has an object {name!r} without the four numbers of a box: correct it.") from error
        if not name:
            raise ValueError(f"{path} has an object without a name: correct it.")
        found.append(Object(name, half_open(*corners)))
    return found


def half_open(ymin: float, xmin: float, ymax: float, xmax: float) -> Box:
    """VOC counts pixels from 1 and its last row and column belong to the box."""
    return Box(top=ymin - 1, left=xmin - 1, bottom=ymax, right=xmax)


def parsed(path: Path) -> Element:
    """Parse an annotation; a document type, and with it every entity, is refused."""

    def refuse(*_: object) -> None:
        raise ValueError(f"{path} declares a document type, which no annotation of VOC does: it is not read.")

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f"{path} is no whole XML ({error}): get it from its owners.") from error
    return builder.close()
