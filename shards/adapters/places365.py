"""Places365, standard and challenge, by the owners' file lists, and standard in its easy format of class folders.

A class is named as in the easy format: the owners' path without its letter, with "-" for "/", so that
/a/apartment_building/outdoor is apartment_building-outdoor. The owners keep the labels of test.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.data.schema import Sample
from shards.adapters import folder
from shards.adapters.about import About
from shards.adapters.lists import agree, class_of, rows, table
from shards.keys import inside

LAYOUT = (
    "the folder of categories_places365.txt, places365_train_standard.txt and places365_val.txt and of "
    "data_256_standard/ (or data_256/) and val_256/, or of data_large_standard/ and val_large/; or, in the easy "
    "format, the folder places365_standard, with train/<class>/ and val/<class>/ in it"
)
LICENCE = "see the Places download page of MIT"
SPLITS = ("train", "val")
OPTIONS: dict[str, dict[str, Any]] = {
    "--train-list": {
        "choices": ["standard", "challenge"],
        "default": "standard",
        "help": "which list of training pictures to follow (default: standard)",
    },
    "--size": {
        "choices": ["256", "large"],
        "default": "256",
        "help": "pictures of 256 x 256, or the large ones (default: 256)",
    },
}


def about(root: Path, split: str, train_list: str = "standard", size: str = "256") -> About:
    place, by_class = read(root, split, train_list, size)
    folder.refuse_twins(place, by_class)
    return About("places365", list(by_class), LICENCE, sum(map(len, by_class.values())))


def samples(root: Path, split: str, train_list: str = "standard", size: str = "256") -> Iterator[Sample]:
    """Yield one picture of each class in turn; the keys are the same in both formats."""
    place, by_class = read(root, split, train_list, size)
    before = place.relative_to(root).as_posix()
    for class_name, name in folder.in_turn(by_class):
        stem = folder.stem(name.rpartition("/")[2])
        key = f"train/{class_name}/{stem}" if split == "train" else f"val/{stem}"
        yield folder.sample(root, f"{before}/{name}", class_name, key)


def read(root: Path, split: str, listing: str, size: str) -> tuple[Path, dict[str, list[str]]]:
    """The folder of the pictures of a split, and their names in it by class, in the order of the classes."""
    if split not in SPLITS:
        raise ValueError(f"--split {split} has no labels in Places365: it may be train or val.")
    if split == "val" and listing != "standard":
        raise ValueError(
            f"--train-list {listing} is of no effect on --split val, which is the same in both: leave it out."
        )
    if (root / "categories_places365.txt").is_file() or not (root / split).is_dir():
        return by_lists(root, split, listing, size)
    if (listing, size) != ("standard", "256"):
        raise ValueError(
            f"{root} is Places365 in its easy format, which has the standard list in 256 x 256 alone: leave "
            "--train-list and --size out, or give the folder of the owners' file lists."
        )
    by_class = folder.names_by_class(root / split)
    if not by_class:
        raise FileNotFoundError(f"{root / split} holds no class folders with pictures: --root must be {LAYOUT}.")
    if (path := root / f"{split}.txt").is_file():
        named = (name for (name,) in rows(path, "file", LAYOUT))
        there = (f"{split}/{name}" for names in by_class.values() for name in names)
        agree(named, there, path, root)
    return root / split, by_class


def by_lists(root: Path, split: str, listing: str, size: str) -> tuple[Path, dict[str, list[str]]]:
    categories = table(root / "categories_places365.txt", "path class", LAYOUT)
    names = {number: path.strip("/").partition("/")[2].replace("/", "-") for path, (number,) in categories.items()}
    path = root / ("places365_val.txt" if split == "val" else f"places365_train_{listing}.txt")
    labels = table(path, "file class", LAYOUT)
    tried = [f"val_{size}"] if split == "val" else [f"data_{size}_{listing}", f"data_{size}"]
    place = next((root / name for name in tried if (root / name).is_dir()), None)
    if place is None:
        raise FileNotFoundError(f"{root / tried[0]} is missing: --root must be {LAYOUT}.")
    by_class: dict[str, list[str]] = {name: [] for name in names.values()}
    for name, (number,) in labels.items():
        inner = name.lstrip("/")
        inside(place, inner)
        by_class[class_of(number, names, path, name)].append(inner)
    agree((name for listed in by_class.values() for name in listed), folder.files_in(place), path, place)
    return place, by_class
