"""A table of pictures: a row a picture, with its path and its labels, in CSV (.csv, .tsv) or Parquet (.parquet).

Several labels stand in one cell with a separator between; a picture without label shows no class. Tables of millions
of rows are read in batches, in the order of their rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from bigtrain.data.schema import Object, Sample
from bigtrain.images import IMAGE_EXTENSIONS
from shards.adapters.about import About
from shards.adapters.folder import extension, stem
from shards.adapters.lists import warn, warn_of_alike, warn_of_one_hot
from shards.keys import inside
from shards.labels import names_of

LAYOUT = "the folder that the paths in the table start from"
LICENCE = "unknown"
TRIED = 100  # pictures that are looked for before anything is written
OUTSIDE = r"^/|(^|/)\.\.(/|$)|\x00"  # of a path: it leaves the root
PICTURE = rf"(?i)\.({'|'.join(IMAGE_EXTENSIONS)})$"
OPTIONS: dict[str, dict[str, Any]] = {
    "--table": {"required": True, "type": os.path.abspath, "metavar": "FILE", "help": "a .csv, .tsv or .parquet file"},
    "--path-column": {"default": "path", "metavar": "NAME", "help": "column of the pictures' paths (default: path)"},
    "--label-column": {"default": "label", "metavar": "NAME", "help": "column of the labels (default: label)"},
    "--separator": {"default": "|", "metavar": "TEXT", "help": 'between labels (default: |; "": one label a cell)'},
    "--mask-column": {
        "metavar": "NAME",
        "help": "column of the masks' paths, empty where there is none (default: no masks)",
    },
    "--split-column": {"metavar": "NAME", "help": "take the rows where it is --split (default: all rows)"},
}


def about(root: Path, split: str, **options: Any) -> About:
    """One pass over the table, which finds what is wrong with any row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from shards.adapters.table_rows import columns_of, rows

    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: --root must be {LAYOUT}.")
    table = options["table"]
    batches = list(rows(root, split, **options))
    paths = pa.chunked_array([batch["path"] for batch in batches], pa.string())
    if not len(paths):
        there = pc.unique(pa.chunked_array([b["split"] for b in rows(root, None, **options)], pa.string())).to_pylist()
        what = f"--split may be {', '.join(sorted(there))}" if there else "give a table with rows"
        raise ValueError(f"{table} has no row of split {split}: {what}.")
    masks = pa.chunked_array([batch["mask"] for batch in batches if options["mask_column"]], pa.string())
    for column, names, wrong in (("path", paths, f"{OUTSIDE}|^$"), ("mask", masks, OUTSIDE)):
        for name in names.filter(pc.match_substring_regex(names, wrong)).slice(0, 1).to_pylist():
            refuse(root, split, column, name, options)
    for wrong in paths.filter(pc.invert(pc.match_substring_regex(paths, PICTURE))).slice(0, 1).to_pylist():
        raise ValueError(f"{table} names {wrong!r}; pictures may be {', '.join(IMAGE_EXTENSIONS)}.")
    keys = pc.replace_substring_regex(paths, r"\.[^./]*$", "")
    if pc.count_distinct(keys).as_py() < len(keys):
        counted = pc.value_counts(keys)
        twice = counted.filter(pc.greater(counted.field("counts"), 1))[0]["values"].as_py()
        raise ValueError(
            f"{table} names the picture {twice} more than once (its name without extension is its key): give each "
            f"picture one row, with {options['separator'] or '|'!r} between its labels."
        )
    tried = paths.slice(0, TRIED).to_pylist()
    if not any(inside(root, path).is_file() for path in tried):
        raise FileNotFoundError(f"{root / tried[0]} is missing, as are more of {table}: --root must be {LAYOUT}.")
    cells = [pc.value_counts(batch["label"]) for batch in batches]
    distinct = {cell.as_py() for counts in cells for cell in counts.field("values")}
    labels = {cell: labels_in(cell, options["separator"], table) for cell in distinct}
    warn_of_alike(set().union(*labels.values()), table)
    warn_of_one_hot({tuple(names) for names in labels.values()}, len(paths), table)
    unlabelled = sum(n["counts"].as_py() for counts in cells for n in counts if not labels[n["values"].as_py()])
    if unlabelled:
        warn(f"{unlabelled} of the {len(paths)} rows of {table} have no label: their pictures show no class.")
    if "split" in columns_of(Path(table)) and "split" not in options.values():
        warn(f"{table} has a column 'split', and all rows are taken: --split-column split takes those of --split.")
    return About(Path(table).stem, sorted(set().union(*labels.values())), LICENCE, len(paths))


def samples(root: Path, split: str, **options: Any) -> Iterator[Sample]:
    """Yield the pictures in the order of their rows."""
    from shards.adapters.table_rows import rows

    for batch in rows(root, split, **options):
        for row in batch.to_pylist():
            path = inside(root, row["path"])
            yield Sample(
                key=stem(row["path"]),
                image=path,
                image_ext=extension(path),
                objects=[Object(name) for name in labels_in(row["label"], options["separator"], options["table"])],
                source=row["path"],
                mask=inside(root, row["mask"]) if row.get("mask") else None,
            )


def refuse(root: Path, split: str, column: str, name: str, options: dict[str, Any]) -> NoReturn:
    """Refuse a path in the table; rows are counted from 1, header included."""
    from shards.adapters.table_rows import rows

    table = options["table"]
    every = (row for batch in rows(root, None, **options) for row in batch.to_pylist())
    first = 1 if table.endswith(".parquet") else 2
    number = next(n for n, row in enumerate(every, first) if row[column] == name and row["split"] in (split, None))
    if not name:
        raise ValueError(f"row {number} of {table} has an empty path: give it one, or take the row away.")
    raise ValueError(
        f"row {number} of {table} names {name!r}, which lies outside of {root}, and nothing outside is read: "
        "correct the row, or give as --root a folder that holds all its pictures."
    )


def labels_in(cell: str, separator: str, table: str) -> list[str]:
    """The labels of a cell, each once."""
    try:
        return names_of(cell.split(separator) if separator else cell)
    except ValueError as error:
        raise ValueError(f"a row of {table} {error}: correct it.") from error
