"""Pictures in class folders: ROOT/<class>/**/*.jpg, the class being the name of the first folder.

Pictures are listed as text, some 90 bytes each, so that 14 million of them need little more than a gigabyte.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from bigtrain.data.schema import IMAGE_EXTENSIONS, Object, Sample
from bigtrain.text import counted
from shards.adapters.about import About
from shards.adapters.lists import few, warn

LAYOUT = "a folder of class folders: ROOT/<class>/**/*.jpg (or .png, .webp ...); --split only names it"
SPLITS = ("train", "val", "valid", "validation", "test")
T = TypeVar("T")


def about(root: Path, split: str) -> About:
    """A picture in no class folder is refused, and so are two of one name; files that are not pictures are reported."""
    by_class = names_by_class(root)
    if loose := loose_pictures(root):
        raise ValueError(
            f"{root} has {counted(len(loose), 'picture')} in no class folder ({few(loose)}): the folder of a picture "
            f"is its class, so move each to its own, or all to one, {root / 'pictures'} say."
        )
    if not by_class:
        raise FileNotFoundError(f"{root} holds no class folders with pictures: --root must be {LAYOUT}.")
    refuse_twins(root, by_class)
    if set(by_class) <= set(SPLITS):
        first = next(name for name in SPLITS if name in by_class)
        warn(
            f"the classes of {root} are {few(list(by_class))}, which are names of splits: if these folders hold the "
            f"class folders, build each by itself, with --root {root / first} say."
        )
    if others := [name for folder in class_folders(root) for name in files_in(root, f"{folder}/", pictures=False)]:
        warn(f"{counted(len(others), 'file')} in {root} left out, for by name they are not pictures: {few(others)}.")
    return About(root.resolve().name, list(by_class), "unknown", sum(map(len, by_class.values())))


def samples(root: Path, split: str) -> Iterator[Sample]:
    """Yield one picture of each class in turn."""
    for class_name, name in in_turn(names_by_class(root)):
        yield sample(root, name, class_name)


def sample(root: Path, name: str, class_name: str, key: str = "") -> Sample:
    """A picture that shows one class; its key is its name in the root, unless another is given."""
    return Sample(key or stem(name), root / name, extension(name), [Object(class_name)], source=name)


def names_by_class(root: Path, is_class: Callable[[str], bool] = bool) -> dict[str, list[str]]:
    """Class folders by name, each with its pictures at any depth as names in the root; empty ones are left out."""
    found = {folder: sorted(files_in(root, f"{folder}/")) for folder in filter(is_class, class_folders(root))}
    return {folder: names for folder, names in found.items() if names}


def grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """From (class, picture) to the pictures of each class."""
    by_class: dict[str, list[T]] = {}
    for class_name, picture in pairs:
        by_class.setdefault(class_name, []).append(picture)
    return by_class


def class_folders(root: Path) -> list[str]:
    """The folders in the root, links to folders too, by name; .hidden ones are none."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: --root must be {LAYOUT}.")
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def loose_pictures(root: Path) -> list[str]:
    """The pictures that lie in the root itself."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if is_picture(entry.name) and not entry.is_dir())


def files_in(root: Path, inner: str = "", pictures: bool = True) -> Iterator[str]:
    """The pictures, or else the other files, of root/inner at any depth, as names in the root; none that is hidden."""
    folders = [inner]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{entry.name}/")
                elif entry.is_symlink() and entry.is_dir():
                    raise ValueError(
                        f"{entry.path} is a link to a folder, and links may go in a circle: only those of class "
                        "folders are followed. Put the folder itself there."
                    )
                elif is_picture(entry.name) == pictures:
                    yield f"{folder}{entry.name}"


def is_picture(name: str) -> bool:
    return not name.startswith(".") and extension(name) in IMAGE_EXTENSIONS


def refuse_twins(root: Path, by_class: Mapping[str, Sequence[str]]) -> None:
    """Refuse a.jpg beside a.png: a key is a name without its extension."""
    for names in by_class.values():
        first_of: dict[str, str] = {}
        if len({stem(name) for name in names}) < len(names):
            for name in names:
                if (first := first_of.setdefault(stem(name), name)) != name:
                    raise ValueError(
                        f"{first} and {name} in {root} have the same key {stem(name)!r}: keys are names without "
                        "extension, so rename one of the two, or take one away."
                    )


def in_turn(by_class: Mapping[str, Sequence[T]]) -> Iterator[tuple[str, T]]:
    """The first picture of each class, then the second of each, so that every shard shows many classes."""
    for row in itertools.zip_longest(*by_class.values()):
        yield from ((name, picture) for name, picture in zip(by_class, row, strict=True) if picture is not None)


def stem(name: str) -> str:
    """The name without extension; from text, since a Path takes ten times as long."""
    return os.path.splitext(name)[0]  # noqa: PTH122


def extension(path: Path | str) -> str:
    return os.path.splitext(path)[1][1:].lower()  # noqa: PTH122


def pictures_by_class(root: Path) -> dict[str, list[Path]]:
    """As names_by_class, for sets of moderate size."""
    return {folder: [root / name for name in names] for folder, names in names_by_class(root).items()}
