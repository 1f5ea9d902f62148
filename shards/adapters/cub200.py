"""CUB-200, birds: the release of 2011 and that of 2010, with their boxes, and with the masks of 2011 on demand.

A class is the name behind the number of its folder (001.Black_footed_Albatross), and classes are sorted by that name.
Boxes are taken as the owners' edges, from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtrain.data.schema import Box, Object, Sample
from shards.adapters import folder
from shards.adapters.about import About
from shards.adapters.caltech256 import behind_number
from shards.adapters.lists import agree, class_of, few, read_mat, rows, table
from shards.keys import inside

LAYOUT = (
    "the folder CUB_200_2011, with images/, images.txt, image_class_labels.txt, classes.txt, train_test_split.txt and "
    "bounding_boxes.txt in it, or that of the release of 2010, with images/, lists/ and, for boxes, annotations-mat/"
)
LICENCE = "see Caltech's pages of CUB-200"
SPLITS = ("train", "test", "all")
OPTIONS: dict[str, dict[str, Any]] = {
    "--masks": {"action": "store_true", "help": "take segmentations/ of the release of 2011 as masks"}
}


def about(root: Path, split: str, masks: bool = False) -> About:
    root, birds = read(root, split)
    place = root / "images"
    everything = birds if split == "all" else read(root, "all")[1]
    by_class = folder.grouped((name.partition("/")[0], name) for name in everything)
    agree(everything, folder.files_in(place), "the owners' list", place)
    folder.refuse_twins(place, by_class)
    classes = sorted(set(everything.values()))
    if len(classes) < len(by_class):
        raise ValueError(f"{place} has {len(by_class)} folders for {len(classes)} classes: get it from its owners.")
    if masks:
        lacking = [name for name in birds if not mask_of(root, name).is_file()]
        if lacking:
            raise FileNotFoundError(
                f"{len(lacking)} pictures have no mask in {root / 'segmentations'} ({few(lacking)}): unpack "
                "segmentations.tgz of the release of 2011 there, or leave --masks out."
            )
    boxes(root, birds)
    name = "cub200_2011" if is_2011(root) else "cub200_2010"
    numbered = tuple(dict.fromkeys(everything[bird] for bird in sorted(everything)))  # 001.Black_footed_Albatross/...
    return About(name, classes, LICENCE, len(birds), numbered)


def samples(root: Path, split: str, masks: bool = False) -> Iterator[Sample]:
    """Yield one picture of each class in turn; Black_footed_Albatross/<file> is the key."""
    root, birds = read(root, split)
    box_of_picture = boxes(root, birds)
    by_class = folder.grouped((class_name, name) for name, class_name in birds.items())
    for class_name, name in folder.in_turn(dict(sorted(by_class.items()))):
        yield Sample(
            key=f"{class_name}/{folder.stem(name.rpartition('/')[2])}",
            image=root / "images" / name,
            image_ext=folder.extension(name),
            objects=[Object(class_name, box_of_picture.get(name))],
            source=f"images/{name}",
            mask=mask_of(root, name) if masks else None,
        )


def read(root: Path, split: str) -> tuple[Path, dict[str, str]]:
    """The folder of the release, and the class of each picture of a split, by its name in images/."""
    if split not in SPLITS:
        raise ValueError(f"--split {split} is not in CUB-200: it may be {', '.join(SPLITS)}.")
    root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    if not (root / "images").is_dir():
        raise FileNotFoundError(f"{root / 'images'} is missing: --root must be {LAYOUT}.")
    if is_2011(root):
        return root, listed_2011(root, split)
    parts = ("train", "test") if split == "all" else (split,)
    names = [name for part in parts for (name,) in rows(root / "lists" / f"{part}.txt", "file", LAYOUT)]
    if odd := [name for name in names if not behind_number(name.partition("/")[0])]:
        raise ValueError(f"{root / 'lists'} names {few(odd)}, where 001.Black_footed_Albatross/... should be.")
    return root, {str(inside(Path(), name)): behind_number(name.partition("/")[0]) for name in names}


def is_2011(root: Path) -> bool:
    return (root / "images.txt").is_file() or not (root / "lists").is_dir()


def listed_2011(root: Path, split: str) -> dict[str, str]:
    """images.txt numbers the pictures; the other lists go by that number."""
    images = table(root / "images.txt", "id file", LAYOUT)
    class_names = table(root / "classes.txt", "class name", LAYOUT)
    classes = {number: behind_number(name) or name for number, (name,) in class_names.items()}
    labels = table(root / "image_class_labels.txt", "id class", LAYOUT)
    is_train = table(root / "train_test_split.txt", "id is_training_image", LAYOUT)
    for name, other in (("image_class_labels.txt", labels), ("train_test_split.txt", is_train)):
        agree(other, images, root / name, root / "images.txt", what="ids")
    wanted = {"train": ("1",), "test": ("0",), "all": ("0", "1")}[split]
    return {
        str(inside(Path(), name)): class_of(labels[number][0], classes, root / "image_class_labels.txt", name)
        for number, (name,) in images.items()
        if is_train[number][0] in wanted
    }


def boxes(root: Path, birds: Mapping[str, str]) -> Mapping[str, Box]:
    """The box of each picture of a split, where the owners' boxes are there."""
    if is_2011(root):
        listed = table(root / "bounding_boxes.txt", "id left top width height", LAYOUT)
        images = {number: name for number, (name,) in table(root / "images.txt", "id file", LAYOUT).items()}
        agree(listed, images, root / "bounding_boxes.txt", root / "images.txt", what="ids")
        return {images[number]: box_of(root / "bounding_boxes.txt", words) for number, words in listed.items()}
    annotations = root / "annotations-mat"
    if not annotations.is_dir():
        return {}
    return {name: box_of_mat(annotations / f"{folder.stem(name)}.mat") for name in birds}


def box_of(path: Path, words: list[str]) -> Box:
    try:
        left, top, width, height = map(float, words)
    except ValueError as error:
        raise ValueError(f"{path} has a line {' '.join(words)!r}, where four numbers should be.") from error
    return Box(top, left, top + height, left + width)


def box_of_mat(path: Path) -> Box:
    """The variable bbox of the release of 2010: left, top, right and bottom."""
    (bbox,) = read_mat(path, ["bbox"], LAYOUT)
    try:
        return Box(*(float(bbox[0][side]) for side in ("top", "left", "bottom", "right")))
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} has a bbox without left, top, right and bottom: get it from its owners.") from error


def mask_of(root: Path, name: str) -> Path:
    """segmentations/ lies beside the pictures, or beside the folder of the release, as its archive unpacks."""
    inner = Path("segmentations", f"{folder.stem(name)}.png")
    return root / inner if (root / "segmentations").is_dir() else root.parent / inner
