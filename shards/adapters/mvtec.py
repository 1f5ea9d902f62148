"""MVTec AD: good parts and defects by kind, one category of objects or all fifteen, with a mask for each defect.

The classes of one category are "good" and its kinds of defect; of several categories they are "tile/good",
"tile/crack" ... The kinds that only the test pictures show are classes of train as well. Data sets of the same layout
are read too; MVTec AD 2 and MVTec LOCO, which have several folders of tests and several masks a picture, are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.data.schema import Object, Sample
from shards.adapters.about import About
from shards.adapters.folder import extension, files_in, in_turn, names_by_class, pictures_by_class, refuse_twins
from shards.adapters.lists import warn

GOOD = "good"
LAYOUT = (
    "a category such as tile/, with train/good/, test/<good or defect>/ and ground_truth/<defect>/<name>_mask.png "
    "in it, or the folder of all categories"
)
LICENCE = "CC BY-NC-SA 4.0"
OPTIONS: dict[str, dict[str, Any]] = {
    "--category": {
        "default": "all",
        "metavar": "NAME",
        "help": "one category of the folder of all (default: all, and the classes are tile/good, tile/crack ...)",
    }
}


def about(root: Path, split: str, category: str = "all", dataset: str = "", licence: str = "") -> About:
    """Data are MVTec's own, by name and licence, where their license.txt lies beside them."""
    chosen = categories(root, category)
    if not dataset:
        is_theirs = any((folder / "license.txt").is_file() for folder in (root, *chosen.values()))
        dataset, licence = ("mvtec-ad", LICENCE) if is_theirs else (root.resolve().name, "unknown")
        if not is_theirs:
            warn(
                f"{root} has no license.txt of MVTec AD, so the set is called {dataset}, of unknown licence: give "
                f"--name mvtec-ad --licence '{LICENCE}' if it is theirs."
            )
    classes = [prefix + kind for prefix, folder in chosen.items() for kind in kinds_of(folder)]
    only = next(iter(chosen.values())).resolve().name if list(chosen) == [""] else ""
    total = 0
    for folder in chosen.values():
        of_folder = sum(map(len, pictures_of(folder, split).values()))
        refuse_twins(folder / split, names_by_class(folder / split))
        if beside := sum(1 for _ in files_in(folder / split)) - of_folder:
            warn(f"{beside} pictures in {folder / split} lie in no folder of a kind: they are left out.")
        total += of_folder
    return About(f"{dataset}-{only}" if only and only != dataset else dataset, classes, licence, total)


def samples(root: Path, split: str, category: str = "all") -> Iterator[Sample]:
    """Yield one picture of each class in turn."""
    masks_by_class = {
        prefix + kind: masks
        for prefix, folder in categories(root, category).items()
        for kind, masks in pictures_of(folder, split).items()
    }
    for name, path in in_turn({name: list(masks) for name, masks in masks_by_class.items()}):
        inner = path.relative_to(root)
        yield Sample(
            key=inner.with_suffix("").as_posix(),
            image=path,
            image_ext=extension(path),
            objects=[Object(name)],
            source=inner.as_posix(),
            mask=masks_by_class[name][path],
        )


def categories(root: Path, category: str) -> dict[str, Path]:
    """The folders to read, each by the prefix of its class names, empty where there is one category."""
    if is_category(root):
        if category not in ("all", root.resolve().name):
            raise ValueError(f"--root {root} is one category, and --category is {category}: leave one of them out.")
        return {"": root}
    found = {path.name: path for path in sorted(root.glob("*")) if is_category(path)}
    if not found:
        raise FileNotFoundError(f"{root} holds no category: --root must be {LAYOUT}.")
    if category == "all":
        return {f"{name}/": path for name, path in found.items()}
    if category not in found:
        raise ValueError(f"--category {category} is not in {root}: it may be all, {', '.join(found)}.")
    return {"": found[category]}


def is_category(folder: Path) -> bool:
    return (folder / "train" / GOOD).is_dir() or (folder / "test" / GOOD).is_dir()


def kinds_of(folder: Path) -> list[str]:
    """Good, then the kinds of defect by name."""
    shown = {
        kind for split in ("train", "test") if (folder / split).is_dir() for kind in pictures_by_class(folder / split)
    }
    return sorted(shown, key=lambda kind: (kind != GOOD, kind))


def pictures_of(folder: Path, split: str) -> dict[str, dict[Path, Path | None]]:
    """By kind, each picture with its mask; a defect without a mask and a mask without a picture are refused."""
    place = folder / split
    if not place.is_dir():
        there = " or ".join(name for name in ("train", "test") if (folder / name).is_dir())
        raise FileNotFoundError(f"{place} is missing: --split may be {there}, and --root must be {LAYOUT}.")
    by_kind = pictures_by_class(place)
    masks = masks_in(folder / "ground_truth")
    found = {
        kind: {path: masks.get(kind, {}).get(path.stem) for path in pictures} for kind, pictures in by_kind.items()
    }
    bare = [path for kind in found for path, mask in found[kind].items() if kind != GOOD and mask is None]
    if bare:
        expected = folder / "ground_truth" / bare[0].parent.name / f"{bare[0].stem}_mask.png"
        raise FileNotFoundError(f"{len(bare)} defects have no mask, {bare[0]} for one: it should be {expected}.")
    used = {mask for of_kind in found.values() for mask in of_kind.values()}
    idle = [mask for of_kind in masks.values() for mask in of_kind.values() if mask not in used]
    if idle and split == "test":
        expected = place / idle[0].parent.name
        raise FileNotFoundError(f"{len(idle)} masks have no picture, {idle[0]} for one: it should be in {expected}.")
    return found


def masks_in(ground_truth: Path) -> dict[str, dict[str, Path]]:
    """Masks by kind and by the stem of their pictures: 000_mask.png, or 000.png where others made the layout."""
    if not ground_truth.is_dir():
        return {}
    found: dict[str, dict[str, Path]] = {}
    for kind, paths in pictures_by_class(ground_truth).items():
        for path in paths:
            if path.parent != ground_truth / kind:
                raise ValueError(f"{path} is one of several masks of a picture, as MVTec LOCO has: it is not read.")
            found.setdefault(kind, {})[path.stem.removesuffix("_mask")] = path
    return found
