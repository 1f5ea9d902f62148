"""VisA: normal and anomalous parts of twelve objects, with a mask for each anomaly.

ROOT is the data set as its owners pack it, with split_csv/, or arranged as MVTec AD is. The owners' classes are
"normal" and "anomaly"; of several objects they are "candle/normal", "candle/anomaly" ... The values of a mask's pixels
stay as they are: they number the kinds of defect.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.data.schema import Object, Sample
from shards.adapters import mvtec
from shards.adapters.about import About
from shards.adapters.folder import extension, files_in, grouped, in_turn
from shards.adapters.lists import compare
from shards.keys import inside

LAYOUT = "the folder of split_csv/1cls.csv and of candle/Data/Images/ ..., or one arranged as MVTec AD is"
LICENCE = "CC BY 4.0"
CLASSES = ("normal", "anomaly")
COLUMNS = ("object", "split", "label", "image", "mask")
OPTIONS: dict[str, dict[str, Any]] = {
    "--category": {
        "default": "all",
        "metavar": "NAME",
        "help": "one of the objects (default: all, and the classes are candle/normal, candle/anomaly ...)",
    },
    "--setup": {
        "default": "1cls",
        "metavar": "NAME",
        "help": "a list of split_csv/: 1cls (the default), 2cls_highshot or 2cls_fewshot, which train on anomalies too",
    },
}


def about(root: Path, split: str, category: str = "all", setup: str = "1cls") -> About:
    listing = listing_of(root, setup)
    if listing is None:
        return mvtec.about(root, split, category, dataset="visa", licence=LICENCE)
    rows = rows_of(listing, split, category)
    compare([row["image"] for row in rows], files_in(root), f"{listing.name} ({split})", root, is_whole=False)
    masks = [(row["image"], inside(root, row["mask"])) for row in rows if row["mask"]]
    bare = [image for image, mask in masks if not mask.is_file()] + [
        row["image"] for row in rows if row["label"] == "anomaly" and not row["mask"]
    ]
    if bare:
        raise FileNotFoundError(f"{len(bare)} anomalies of {listing} have no mask, {bare[0]} for one: get it too.")
    objects = sorted({row["object"] for row in rows})
    prefixes = [f"{name}/" for name in objects] if category == "all" else [""]
    name = "visa" if category == "all" else f"visa-{category}"
    return About(name, [prefix + label for prefix in prefixes for label in CLASSES], LICENCE, len(rows))


def samples(root: Path, split: str, category: str = "all", setup: str = "1cls") -> Iterator[Sample]:
    """Yield one picture of each class in turn."""
    listing = listing_of(root, setup)
    if listing is None:
        yield from mvtec.samples(root, split, category)
        return
    row_of = {inside(root, row["image"]): row for row in rows_of(listing, split, category)}
    names = ((f"{row['object']}/" if category == "all" else "") + row["label"] for row in row_of.values())
    for name, path in in_turn(grouped(sorted(zip(names, row_of, strict=True)))):
        row = row_of[path]
        yield Sample(
            key=f"{row['object']}/{split}/{row['label']}/{path.stem}",
            image=path,
            image_ext=extension(path),
            objects=[Object(name)],
            source=row["image"],
            mask=inside(root, row["mask"]) if row["mask"] else None,
        )


def listing_of(root: Path, setup: str) -> Path | None:
    """split_csv/<setup>.csv; None where the data set is arranged as MVTec AD is."""
    folder = root / "split_csv"
    if (folder / f"{setup}.csv").is_file():
        return folder / f"{setup}.csv"
    if there := sorted(path.stem for path in folder.glob("*.csv")):
        raise FileNotFoundError(f"{folder / setup}.csv is missing: --setup may be {', '.join(there)}.")
    if mvtec.is_category(root) or any(map(mvtec.is_category, root.glob("*"))):
        return None
    raise FileNotFoundError(f"{folder / setup}.csv is missing: --root must be {LAYOUT}.")


def rows_of(listing: Path, split: str, category: str) -> list[dict[str, str]]:
    """The lines of a list that are of a split and of an object, or of all objects."""
    try:
        with listing.open(newline="", encoding="utf-8-sig") as file:
            rows = list(reader := csv.DictReader(file, restval="", restkey="more"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{listing} is no CSV ({error}): get it from its owners.") from error
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or [])]:
        raise ValueError(f"{listing} has no column {', '.join(missing)}: get it from its owners.")
    if twice := [image for image, times in Counter(row["image"] for row in rows).items() if times > 1]:
        raise ValueError(f"{listing} lists {twice[0]} more than once: get it from its owners.")
    for number, row in enumerate(rows, 2):
        if row["label"] not in CLASSES:
            raise ValueError(f"line {number} of {listing} has the label {row['label']!r}, not normal or anomaly.")
    for name, given, there in (
        ("split", split, {row["split"] for row in rows}),
        ("category", category, {row["object"] for row in rows} | {"all"}),
    ):
        if given not in there:
            raise ValueError(f"--{name} {given} is not in {listing}: it may be {', '.join(sorted(there))}.")
    return [row for row in rows if row["split"] == split and category in ("all", row["object"])]
