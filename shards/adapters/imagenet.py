"""ImageNet (ILSVRC 2012 and the 21k of all synsets) and Tiny-ImageNet.

A class is named by its wnid (n01443537), as the owners' folders are; words.txt names several classes alike ("crane").
Read are train/<wnid>/, and val in class folders, by Kaggle's LOC_val_solution.csv, by the owners' development kit or
by Tiny-ImageNet's val_annotations.txt; or class folders without train/, as of 21k. Boxes are read where Kaggle's
ILSVRC/Annotations/ is there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from bigtrain.data.schema import Box, Object, Sample
from shards.adapters import folder, voc
from shards.adapters.about import About
from shards.adapters.lists import agree, class_of, read_mat, rows

LAYOUT = (
    "the folder of train/<wnid>/*.JPEG (or train/<wnid>/images/*.JPEG, or <wnid>/*.JPEG for 21k) and of val/<wnid>/, "
    "val/*.JPEG with LOC_val_solution.csv or ILSVRC2012_devkit_t12/, or val/images/ with val/val_annotations.txt"
)
LICENCE = "ImageNet's terms of access: research and education, not commercial"
DEVKIT = Path("ILSVRC2012_devkit_t12", "data")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SOLUTION = "LOC_val_solution.csv"
UNPACK = (
    "mkdir train val; tar -xf ILSVRC2012_img_val.tar -C val; tar -xf ILSVRC2012_img_train.tar -C train; cd train; "
    'for t in n*.tar; do mkdir "${t%.tar}" && tar -xf "$t" -C "${t%.tar}" && rm "$t"; done'
)


def about(root: Path, split: str) -> About:
    place, by_wnid = pictures(root, split)
    if split == "train":
        folder.refuse_twins(place, by_wnid)
    name = "tiny-imagenet" if (root / "val" / "val_annotations.txt").is_file() else "imagenet"
    return About(name, sorted(by_wnid), LICENCE, sum(map(len, by_wnid.values())))


def samples(root: Path, split: str) -> Iterator[Sample]:
    """Yield train one class in turn, val in the order of file names, which is the same in every layout."""
    place, by_wnid = pictures(root, split)
    base = pictures_root(root)
    before = "" if place == base else f"{place.relative_to(base).as_posix()}/"
    annotations = root / "ILSVRC" / "Annotations" / "CLS-LOC" / split
    has_boxes = annotations.is_dir()
    if split == "train":
        pairs = folder.in_turn(by_wnid)
    else:
        named = ((wnid, name) for wnid, names in by_wnid.items() for name in names)
        pairs = iter(sorted(named, key=lambda pair: pair[1].rpartition("/")[2]))
    for wnid, name in pairs:
        stem = folder.stem(name.rpartition("/")[2])
        inner = f"{wnid}/{stem}" if split == "train" else stem
        found = boxes_in(annotations / f"{inner}.xml") if has_boxes else []
        yield Sample(
            key=f"{split}/{inner}",
            image=place / name,
            image_ext=folder.extension(name),
            objects=[Object(wnid, box) for box in found] or [Object(wnid)],
            source=before + name,
        )


def boxes_in(path: Path) -> list[Box]:
    """The boxes of an annotation, all of the picture's own class; a picture without annotation has none.

    ImageNet counts pixels from 0, and its numbers are taken for the edges.
    """
    found = [thing.box for thing in voc.objects_in(path)] if path.is_file() else []
    return [Box(box.top + 1, box.left + 1, box.bottom, box.right) for box in found if box]  # VOC counts from 1


def pictures_root(root: Path) -> Path:
    """The folder of train/ and val/: the root, or deep inside it, as Kaggle's archive unpacks."""
    deep = root / "ILSVRC" / "Data" / "CLS-LOC"
    return deep if deep.is_dir() else root


def pictures(root: Path, split: str) -> tuple[Path, dict[str, list[str]]]:
    """The folder of the pictures, and their names in it by wnid."""
    if split not in ("train", "val"):
        raise ValueError(f"--split {split} has no labels in ImageNet: it may be train or val.")
    base = pictures_root(root)
    place = base / split
    by_wnid: dict[str, list[str]]
    if split == "train":
        place = place if place.is_dir() else base
        by_wnid = wnids_in(place)
    else:
        if not place.is_dir() and (base / "ILSVRC2012_val_00000001.JPEG").is_file():
            place = base
        by_wnid = wnids_in(place) if place.is_dir() and place != base else {}
        if (place / "val_annotations.txt").is_file():
            place, by_wnid = place / "images", listed(place / "images", *tiny_labels(place / "val_annotations.txt"))
        elif not by_wnid and place.is_dir() and (root / SOLUTION).is_file():
            by_wnid = listed(place, *solution_labels(root / SOLUTION))
        elif not by_wnid and place.is_dir() and (root / DEVKIT).is_dir():
            by_wnid = listed(place, *devkit_labels(root / DEVKIT))
    if not by_wnid:
        if root.suffix == ".tar" or any(root.glob("*.tar")) or any(place.glob("*.tar")):
            raise FileNotFoundError(f"{root} holds archives, which are not read: unpack them first: {UNPACK}")
        raise FileNotFoundError(f"{place} holds no pictures with labels: --root must be {LAYOUT}.")
    return place, by_wnid


def wnids_in(place: Path) -> dict[str, list[str]]:
    """Folders named as a wnid, n and digits, with their pictures."""
    is_wnid = re.compile(r"n\d+").fullmatch
    return folder.names_by_class(place, lambda name: bool(is_wnid(name))) if place.is_dir() else {}


def listed(place: Path, labels: dict[str, str], listing: Path) -> dict[str, list[str]]:
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is missing: --root must be {LAYOUT}.")
    agree(labels, folder.loose_pictures(place), listing, place)
    return folder.grouped((wnid, name) for name, wnid in labels.items())


def tiny_labels(path: Path) -> tuple[dict[str, str], Path]:
    """val_annotations.txt: a file, its wnid and a box, which is not read."""
    return {name: wnid for name, wnid, *_ in rows(path, "file wnid left top right bottom", LAYOUT)}, path


def solution_labels(path: Path) -> tuple[dict[str, str], Path]:
    """LOC_val_solution.csv: ImageId, and "wnid left top right bottom" for each box."""
    with path.open(newline="") as file:
        try:
            rows_read = csv.DictReader(file)
            return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows_read}, path
        except (KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} lacks ImageId or PredictionString in a row: get it from its owners.") from error


def devkit_labels(devkit: Path) -> tuple[dict[str, str], Path]:
    """The ground truth has a line a picture: a number of the development kit's own, which meta.mat gives a wnid."""
    (synsets,) = read_mat(devkit / "meta.mat", ["synsets"], LAYOUT)
    try:
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
        wnids = {str(int(number)): str(wnid) for number, wnid, children in pairs if int(children) == 0}
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{devkit / 'meta.mat'} does not name the synsets as the development kit of 2012 does ({error}): "
            "get it from its owners."
        ) from error
    path = devkit / GROUND_TRUTH
    labels = {}
    for number, (label,) in enumerate(rows(path, "class", LAYOUT), 1):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        labels[name] = class_of(label, wnids, path, name)
    return labels, path
