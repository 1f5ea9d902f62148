"""Caltech-256: 256_ObjectCategories/001.ak47/001_0001.jpg ..., the class being the name behind the number.

Classes are sorted by that name, and the manifest keeps the order of the folders too: by it Perera & Patel's known half
is 001 to 128 (--order folder). The 257th folder, clutter, is a background of no one class, and is a class here unless
it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.data.schema import Sample
from bigtrain.text import counted
from shards.adapters import folder
from shards.adapters.about import About
from shards.adapters.lists import few, warn

INNER = "256_ObjectCategories"
LAYOUT = f"the folder {INNER}, with 001.ak47/001_0001.jpg ... in it, or one that holds it; --split only names it"
LICENCE = "CC BY 4.0"
CLUTTER = "clutter"
OPTIONS: dict[str, dict[str, Any]] = {
    "--without-clutter": {"action": "store_true", "help": "leave out 257.clutter, the background"}
}


def about(root: Path, split: str, without_clutter: bool = False) -> About:
    root = categories(root)
    by_class = pictures_by_class(root, without_clutter)
    folder.refuse_twins(root, by_class)
    if others := [name for inner in folder.class_folders(root) for name in folder.files_in(root, f"{inner}/", False)]:
        warn(f"{counted(len(others), 'file')} in {root} left out, for by name they are not pictures: {few(others)}.")
    numbered = sorted(by_class, key=lambda name: by_class[name][0])  # 001.ak47/...
    return About("caltech256", list(by_class), LICENCE, sum(map(len, by_class.values())), tuple(numbered))


def samples(root: Path, split: str, without_clutter: bool = False) -> Iterator[Sample]:
    """Yield one picture of each class in turn; ak47/001_0001 is the key of 001.ak47/001_0001.jpg."""
    root = categories(root)
    for class_name, name in folder.in_turn(pictures_by_class(root, without_clutter)):
        inner = name.partition("/")[2]
        yield folder.sample(root, name, class_name, key=f"{class_name}/{folder.stem(inner)}")


def categories(root: Path) -> Path:
    return root / INNER if (root / INNER).is_dir() else root


def pictures_by_class(root: Path, without_clutter: bool) -> dict[str, list[str]]:
    folders = folder.names_by_class(root) if root.is_dir() else {}
    by_class = {behind_number(name): names for name, names in folders.items() if behind_number(name)}
    if not by_class:
        raise FileNotFoundError(f"{root} holds no folders 001.ak47 ... with pictures: --root must be {LAYOUT}.")
    if len(by_class) < len(folders):
        odd = sorted(set(folders) - {names[0].partition("/")[0] for names in by_class.values()})
        raise ValueError(
            f"{root} has folders whose names are not a number and a class of their own ({few(odd)}): rename them, "
            "or take them away."
        )
    if without_clutter:
        by_class.pop(CLUTTER, None)
    return {name: by_class[name] for name in sorted(by_class)}


def behind_number(name: str) -> str:
    """ "001.ak47" -> "ak47"; nothing where there is no number."""
    number, _, behind = name.partition(".")
    return behind if number.isdigit() else ""
