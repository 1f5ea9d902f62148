"""ImageNet (ILSVRC) and Tiny-ImageNet: train/<wnid>/, and val by an annotation file or in class folders.

A class is named by its wnid (n01443537), as the owners' folders are; words.txt names several classes alike ("crane").
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from bigtrain.data.schema import Object, Sample
from shards.adapters import folder
from shards.adapters.about import About
from shards.names import inside

LAYOUT = (
    "the folder of train/<wnid>/*.JPEG (or train/<wnid>/images/*.JPEG) and of val/images/ with "
    "val/val_annotations.txt, val/*.JPEG with LOC_val_solution.csv, or val/<wnid>/*.JPEG"
)
LICENCE = "ImageNet's terms of access: research and education, not commercial"


def about(root: Path, split: str) -> About:
    pairs = labelled(root, split)
    classes = sorted({wnid for wnid, _ in pairs})
    name = "tiny-imagenet" if (root / "val" / "val_annotations.txt").is_file() else "imagenet"
    return About(name, classes, LICENCE, len(pairs))


def samples(root: Path, split: str) -> Iterator[Sample]:
    """Yield train one class in turn, val in the order of its file names."""
    base = pictures_root(root)
    for wnid, path in labelled(root, split):
        inner = path.relative_to(base)
        yield Sample(
            key=f"{split}/{wnid}/{path.stem}" if split == "train" else f"{split}/{path.stem}",
            image=path,
            image_ext=folder.extension(path),
            objects=[Object(wnid)],
            source=inner.as_posix(),
        )


def pictures_root(root: Path) -> Path:
    """The folder of train/ and val/: the root, or deep inside it, as one of the owners' archives unpacks."""
    deep = root / "ILSVRC" / "Data" / "CLS-LOC"
    return deep if deep.is_dir() else root


def labelled(root: Path, split: str) -> list[tuple[str, Path]]:
    """(wnid, picture) in the order of the shards."""
    if split not in ("train", "val"):
        raise ValueError(f"--split {split} has no labels in ImageNet: it may be train or val.")
    place = pictures_root(root) / split
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is missing: --root must be {LAYOUT}.")
    if split == "val" and (place / "val_annotations.txt").is_file():
        return listed(place / "images", tiny_labels(place / "val_annotations.txt"))
    if split == "val" and (solution := root / "LOC_val_solution.csv").is_file() and not (by_class := wnids_in(place)):
        return listed(place, solution_labels(solution))
    by_class = wnids_in(place)
    if not by_class:
        raise FileNotFoundError(f"{place} holds no folders n01443537 ... with pictures: --root must be {LAYOUT}.")
    return list(folder.in_turn(by_class))


def wnids_in(place: Path) -> dict[str, list[Path]]:
    """Folders named as a wnid, n and digits, with their pictures."""
    return {
        name: paths for name, paths in folder.pictures_by_class(place).items() if name[0] == "n" and name[1:].isdigit()
    }


def listed(place: Path, labels: dict[str, str]) -> list[tuple[str, Path]]:
    return [(labels[name], inside(place, name)) for name in sorted(labels)]


def tiny_labels(path: Path) -> dict[str, str]:
    """val_annotations.txt: file, wnid and the four numbers of a box, with tabs between."""
    labels = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split()
        if fields and len(fields) < 2:
            raise ValueError(f"line {number} of {path} is {line!r}, where a file name and a wnid should be.")
        if fields:
            labels[fields[0]] = fields[1]
    return labels


def solution_labels(path: Path) -> dict[str, str]:
    """LOC_val_solution.csv: ImageId, and "wnid left top right bottom" for each box."""
    with path.open(newline="") as file:
        try:
            return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        except (KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} lacks ImageId or PredictionString in a row: get it from its owners.") from error
