"""Pictures in class folders: ROOT/<class>/**/*.jpg, the class being the name of the first folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from bigtrain.data.schema import IMAGE_EXTENSIONS, Object, Sample
from shards.adapters.about import About

LAYOUT = "a folder of class folders: ROOT/<class>/**/*.jpg (or .png, .webp ...); --split only names it"


def about(root: Path, split: str) -> About:
    by_class = pictures_by_class(root)
    if not by_class:
        raise FileNotFoundError(f"{root} holds no class folders with pictures: --root must be {LAYOUT}.")
    return About(root.resolve().name, list(by_class), "unknown", sum(map(len, by_class.values())))


def samples(root: Path, split: str) -> Iterator[Sample]:
    """Yield one picture of each class in turn."""
    for name, path in in_turn(pictures_by_class(root)):
        inner = path.relative_to(root)
        yield Sample(
            key=inner.with_suffix("").as_posix(),
            image=path,
            image_ext=extension(path),
            objects=[Object(name)],
            source=inner.as_posix(),
        )


def pictures_by_class(root: Path) -> dict[str, list[Path]]:
    """Class folders by name, each with its pictures at any depth; empty and .hidden ones are left out."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: --root must be {LAYOUT}.")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {folder.name: pictures_in(folder) for folder in folders}
    return {name: paths for name, paths in found.items() if paths}


def pictures_in(folder: Path) -> list[Path]:
    return sorted(
        Path(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") and Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS
    )


def in_turn(by_class: dict[str, list[Path]]) -> Iterator[tuple[str, Path]]:
    """The first picture of each class, then the second of each, so that every shard shows many classes."""
    for row in itertools.zip_longest(*by_class.values()):
        yield from ((name, path) for name, path in zip(by_class, row, strict=True) if path is not None)


def extension(path: Path) -> str:
    return path.suffix[1:].lower()
