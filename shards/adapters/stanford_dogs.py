"""Stanford Dogs: the owners' lists of training and test pictures, with the boxes of Annotation/ where it is there.

A class is the name behind the wnid of its folder (n02085620-Chihuahua), and classes are sorted by that name; the
manifest keeps the order of the folders too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bigtrain.data.schema import Object, Sample
from shards.adapters import folder
from shards.adapters.about import About
from shards.adapters.imagenet import boxes_in
from shards.adapters.lists import agree, few, read_mat
from shards.keys import inside

LAYOUT = (
    "the folder of Images/n02085620-Chihuahua/*.jpg ..., of train_list.mat, test_list.mat and file_list.mat and, for "
    "boxes, of Annotation/"
)
LICENCE = "see the page of Stanford Dogs; the pictures are ImageNet's"
LISTS = {"train": "train_list.mat", "test": "test_list.mat", "all": "file_list.mat"}


def about(root: Path, split: str) -> About:
    files = listed(root, split)
    place = root / "Images"
    every = files if split == "all" else listed(root, "all")
    by_class = folder.grouped((class_of_file(name), name) for name in every)
    everything = [name for names in by_class.values() for name in names]
    agree(everything, folder.files_in(place), root / LISTS["all"], place)
    if unknown := sorted(set(files) - set(everything)):
        raise ValueError(
            f"{root / LISTS[split]} names {len(unknown)} pictures that {LISTS['all']} does not ({few(unknown)}): "
            "get the lists from their owners."
        )
    folder.refuse_twins(place, by_class)
    if (annotations := root / "Annotation").is_dir():
        annotated = set(folder.files_in(annotations, pictures=False))
        if bare := [name for name in files if folder.stem(name) not in annotated]:
            raise FileNotFoundError(
                f"{annotations} lacks the annotations of {len(bare)} pictures ({few(bare)}): get it from its owners, "
                "or take the folder away to have no boxes."
            )
    numbered = sorted(by_class, key=lambda name: by_class[name][0])  # n02085620-Chihuahua/...
    return About("stanford_dogs", sorted(by_class), LICENCE, len(files), tuple(numbered))


def samples(root: Path, split: str) -> Iterator[Sample]:
    """Yield one picture of each class in turn; Chihuahua/<file> is the key."""
    by_class = folder.grouped((class_of_file(name), name) for name in listed(root, split))
    for class_name, name in folder.in_turn(dict(sorted(by_class.items()))):
        boxes = boxes_in(root / "Annotation" / folder.stem(name))
        yield Sample(
            key=f"{class_name}/{folder.stem(name.rpartition('/')[2])}",
            image=root / "Images" / name,
            image_ext=folder.extension(name),
            objects=[Object(class_name, box) for box in boxes] or [Object(class_name)],
            source=f"Images/{name}",
        )


def listed(root: Path, split: str) -> list[str]:
    """The pictures of a list, as names in Images/; each number of a class has to go with one folder."""
    if split not in LISTS:
        raise ValueError(f"--split {split} is not in Stanford Dogs: it may be {', '.join(LISTS)}.")
    if not (root / "Images").is_dir():
        raise FileNotFoundError(f"{root / 'Images'} is missing: --root must be {LAYOUT}.")
    path = root / LISTS[split]
    files, labels = read_mat(path, ["file_list", "labels"], LAYOUT)
    if len(files) != len(labels):
        raise ValueError(f"{path} has {len(files)} files and {len(labels)} labels: get it from its owners.")
    names = [str(inside(Path(), str(name))) for name in files]
    class_by_number: dict[int, str] = {}
    for name, number in zip(names, labels.tolist(), strict=True):
        if class_by_number.setdefault(number, class_of_file(name)) != class_of_file(name):
            raise ValueError(
                f"{path} gives {name} the label {number}, which is that of {class_by_number[number]}: "
                "get it from its owners."
            )
    return names


def class_of_file(name: str) -> str:
    """ "n02085620-Chihuahua/n02085620_10074.jpg" -> "Chihuahua"."""
    class_name = name.partition("/")[0].partition("-")[2]
    if not class_name or "/" not in name:
        raise ValueError(f"the lists name {name!r}, where n02085620-Chihuahua/n02085620_10074.jpg ... should be.")
    return class_name
