"""Pictures in class folders: ROOT/<class>/**/*.jpg, the class being the name of the first folder.

A folder of pictures alone, without class folders, is a set that shows no class, or all of them the one of --class-name.

Pictures are listed as text, some 90 bytes each, so that 14 million of them need little more than a gigabyte.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bigtrain.data.schema import Object, Sample
from bigtrain.images import IMAGE_EXTENSIONS
from bigtrain.text import counted
from shards.adapters.about import About
from shards.adapters.lists import few, warn, warn_of_alike

LAYOUT = "a folder of class folders, ROOT/<class>/**/*.jpg (or .png ...), or one of pictures; --split only names it"
OPTIONS: dict[str, dict[str, Any]] = {
    "--class-name": {
        "metavar": "NAME",
        "help": "all pictures, at any depth, show this class (default: the class is the name of the first folder)",
    },
    "--keys-with-extension": {
        "action": "store_true",
        "help": "a.jpg and a.png in one folder are a_jpg and a_png (default: two files of one name are refused)",
    },
}
SPLITS = ("train", "val", "valid", "validation", "test")
T = TypeVar("T")


def about(root: Path, split: str, class_name: str | None = None, keys_with_extension: bool = False) -> About:
    """Pictures beside class folders are refused, and so are two of one name; what is left out is reported."""
    by_class = chosen(root, class_name)
    loose = loose_pictures(root)
    if loose and class_name is None and "" not in by_class:
        raise ValueError(
            f"{root} has {counted(len(loose), 'picture')} in no class folder ({few(loose)}): the folder of a picture "
            "is its class, so move each to its own; or give --class-name, and all pictures show that class."
        )
    tell_of_names(root, by_class)
    if not by_class:
        raise FileNotFoundError(f"{root} holds no pictures: --root must be {LAYOUT}.")
    if not keys_with_extension:
        refuse_twins(root, by_class)
    if set(by_class) <= set(SPLITS):
        first = next(name for name in SPLITS if name in by_class)
        warn(
            f"the classes of {root} are {few(list(by_class))}, which are names of splits: if these folders hold the "
            f"class folders, build each by itself, with --root {root / first} say."
        )
    if "" in by_class:
        warn(f"{root} has no class folders: its pictures show no class, unless --class-name gives them one.")
    return About(root.resolve().name, [n for n in by_class if n], "unknown", sum(map(len, by_class.values())))


def samples(
    root: Path, split: str, class_name: str | None = None, keys_with_extension: bool = False
) -> Iterator[Sample]:
    """Yield one picture of each class in turn."""
    by_class = chosen(root, class_name)
    twins = set(repeated_stems(by_class)) if keys_with_extension else set[str]()
    for of_class, name in in_turn(by_class):
        key = f"{stem(name)}_{extension(name)}" if stem(name) in twins else ""
        yield sample(root, name, of_class, key=key)


def sample(root: Path, name: str, class_name: str, key: str = "") -> Sample:
    """A picture that shows one class, "" for none; its key is its name in the root, unless another is given."""
    objects = [Object(class_name)] if class_name else []
    return Sample(key or stem(name), root / name, extension(name), objects, source=name)


def chosen(root: Path, class_name: str | None) -> dict[str, list[str]]:
    """The pictures of each class: that of --class-name, those of the folders, or "" of pictures without folders."""
    by_class = names_by_class(root)
    if class_name is None and (by_class or not loose_pictures(root)):
        return by_class
    everything = sorted(files_in(root))
    return {class_name or "": everything} if everything else {}


def tell_of_names(root: Path, by_class: Mapping[str, Sequence[str]]) -> None:
    """Say which files and folders are left out for their names, and which names look like a mistake."""
    folders = class_folders(root)
    others = [name for inner in ("", *(f"{name}/" for name in folders)) for name in other_files(root, inner)]
    if others and not by_class:
        kinds = Counter(f".{extension(name)}" if extension(name) else "no extension" for name in others)
        raise FileNotFoundError(
            f"{root} holds no pictures, but {counted(len(others), 'file')} with other extensions "
            f"({few([kind for kind, _ in kinds.most_common()])}): pictures may be {', '.join(IMAGE_EXTENSIONS)}."
        )
    if others:
        warn(f"{counted(len(others), 'file')} in {root} left out, for by name they are not pictures: {few(others)}.")
    if odd := [name for names in by_class.values() for name in names if extension(name) in ("jfif", "jpe")]:
        warn(f"{counted(len(odd), 'picture')} of {root}, named .jfif or .jpe ({few(odd)}), will be .jpg in the shards.")
    are_folders = not set(by_class) - set(folders)
    if empty := [name for name in folders if are_folders and name not in by_class]:
        warn(f"{counted(len(empty), 'folder')} of {root} without a picture, and so no class of the set: {few(empty)}.")
    warn_of_alike(by_class, root)


def repeated_stems(by_class: Mapping[str, Sequence[str]]) -> list[str]:
    """Names without extension that several pictures have."""
    counts = Counter(stem(name) for names in by_class.values() for name in names)
    return [name for name, count in counts.items() if count > 1]


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


def other_files(root: Path, inner: str) -> list[str]:
    """What is no picture, in a class folder at any depth or, for "", in the root itself."""
    if inner:
        return sorted(files_in(root, inner, pictures=False))
    with os.scandir(root) as found:
        return sorted(e.name for e in found if not (e.is_dir() or is_picture(e.name) or e.name.startswith(".")))


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
                        "extension, so rename one of the two, take one away, or use `build folder "
                        "--keys-with-extension`."
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
