"""A table of pictures: a row a picture, with its path and its labels, in CSV (.csv, .tsv) or Parquet (.parquet).

Several labels stand in one cell with a separator between; a picture without label shows no class. Tables of millions
of rows are read in batches, in the order of their rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from bigtrain.data.schema import IMAGE_EXTENSIONS, Object, Sample
from shards.adapters.about import About
from shards.adapters.folder import extension, stem
from shards.adapters.lists import warn
from shards.names import below, inside

LAYOUT = "the folder that the paths in the table start from"
KINDS = (".csv", ".tsv", ".parquet")
LICENCE = "unknown"
READING = pyarrow.csv.ReadOptions(use_threads=False)
TRIED = 100  # pictures that are looked for before anything is written
OUTSIDE = r"^/|(^|/)\.\.(/|$)|\\|\x00"  # of a path: it leaves the root
PICTURE = rf"(?i)\.({'|'.join(IMAGE_EXTENSIONS)})$"
OPTIONS: dict[str, dict[str, Any]] = {
    "--table": {"required": True, "type": os.path.abspath, "metavar": "FILE", "help": f"a {', '.join(KINDS)} file"},
    "--path-column": {"default": "path", "metavar": "NAME", "help": "of the pictures' paths (default: path)"},
    "--label-column": {"default": "label", "metavar": "NAME", "help": "of the labels (default: label)"},
    "--separator": {"default": "|", "metavar": "TEXT", "help": 'between labels (default: |; "": one label a cell)'},
    "--mask-column": {"metavar": "NAME", "help": "of the masks' paths, empty where there is none (default: no masks)"},
    "--split-column": {"metavar": "NAME", "help": "take the rows where it is --split (default: all rows)"},
}


def about(root: Path, split: str, **options: Any) -> About:
    """One pass over the table, which finds what is wrong with any row."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: --root must be {LAYOUT}.")
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
    labels = {cell: labels_in(cell, options["separator"]) for cell in distinct}
    unlabelled = sum(n["counts"].as_py() for counts in cells for n in counts if not labels[n["values"].as_py()])
    if unlabelled:
        warn(f"{unlabelled} of the {len(paths)} rows of {table} have no label: their pictures show no class.")
    if "split" in columns_of(Path(table)) and "split" not in options.values():
        warn(f"{table} has a column 'split', and all rows are taken: --split-column split takes those of --split.")
    return About(Path(table).stem, sorted(set().union(*labels.values())), LICENCE, len(paths))


def samples(root: Path, split: str, **options: Any) -> Iterator[Sample]:
    """Yield the pictures in the order of their rows."""
    for batch in rows(root, split, **options):
        for row in batch.to_pylist():
            path = inside(root, row["path"])
            yield Sample(
                key=stem(row["path"]),
                image=path,
                image_ext=extension(path),
                objects=[Object(name) for name in labels_in(row["label"], options["separator"])],
                source=row["path"],
                mask=inside(root, row["mask"]) if row.get("mask") else None,
            )


def refuse(root: Path, split: str, column: str, name: str, options: dict[str, Any]) -> NoReturn:
    """Refuse a path in the table; its row is counted as people do, who count the header too."""
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


def labels_in(cell: str, separator: str) -> list[str]:
    """The labels of a cell, each once, without spaces around."""
    parts = cell.split(separator) if separator else [cell]
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def rows(
    root: Path,
    split: str | None,
    table: str,
    path_column: str = "path",
    label_column: str = "label",
    separator: str = "|",
    mask_column: str | None = None,
    split_column: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """Batches of the columns path, label and, where there are such, mask and split, as text, nothing for null.

    Absolute paths in the root become paths from it.
    """
    asked = {"path": path_column, "label": label_column, "mask": mask_column, "split": split_column}
    columns = {name: column for name, column in asked.items() if column is not None}
    try:
        for batch in batches_of(Path(table), list(dict.fromkeys(columns.values()))):
            text = {name: as_text(batch[column], separator) for name, column in columns.items()}
            text |= {name: from_root(root, text[name]) for name in ("path", "mask") if name in text}
            part = pa.RecordBatch.from_pydict({"split": pa.nulls(batch.num_rows, pa.string()), **text})
            yield part if split is None or split_column is None else part.filter(pc.equal(part["split"], split))
    except pa.ArrowException as error:
        raise ValueError(f"{table} cannot be read as a table ({error}): correct it, or save it again.") from error


def as_text(cells: pa.Array, separator: str) -> pa.Array:
    """Cells as text, nothing for null; those of a list, which a Parquet file may hold, one behind the other."""
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        if not separator:
            raise ValueError("a column of lists needs a --separator: give one that no label holds.")
        words = pa.array(cells.to_pylist(), pa.list_(pa.string()))
        if pc.any(pc.match_substring(pc.list_flatten(words), separator)).as_py():
            raise ValueError(f"a label holds the separator {separator!r}: give --separator another.")
        cells = pc.binary_join(words, separator)
    return pc.fill_null(cells.cast(pa.string()), "")


def from_root(root: Path, paths: pa.Array) -> pa.Array:
    """Paths from the root, a/b for ./a//b: a picture has one name."""
    odd = pc.match_substring_regex(paths, r"^/|//|(^|/)\./")
    if not pc.any(odd).as_py():
        return paths
    resolved = root.resolve()
    plain = [
        below(root, resolved, PurePosixPath(path).as_posix()) if is_odd else path
        for path, is_odd in zip(paths.to_pylist(), odd.to_pylist(), strict=True)
    ]
    return pa.array(plain, pa.string())


def columns_of(table: Path) -> list[str]:
    kind = table.suffix.lower()
    if not table.is_file() or kind not in KINDS:
        what = f"a {table.suffix} file" if table.is_file() else "missing"
        raise FileNotFoundError(f"--table {table} is {what}: give a {', '.join(KINDS)} file.")
    if kind == ".parquet":
        return list(pq.read_schema(table).names)
    with pyarrow.csv.open_csv(table, READING, parsing(table)) as file:
        return list(file.schema.names)


def parsing(table: Path) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(delimiter="\t" if table.suffix.lower() == ".tsv" else ",", newlines_in_values=True)


def batches_of(table: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    check_columns(table, columns, columns_of(table))
    if table.suffix.lower() == ".parquet":
        with pq.ParquetFile(table) as file:
            yield from file.iter_batches(columns=columns, use_threads=False)
        return
    as_text = pyarrow.csv.ConvertOptions(
        include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
    )
    with pyarrow.csv.open_csv(table, READING, parsing(table), as_text) as file:
        yield from file


def check_columns(table: Path, columns: list[str], there: list[str]) -> None:
    separator = next((mark for mark in ";\t|" if len(there) == 1 and mark in there[0]), None)
    if separator:
        raise ValueError(
            f"the columns of {table} seem to be separated by {separator!r}, for its one column is {there[0]!r}: "
            "save it with commas as .csv, or with tabs as .tsv."
        )
    for column in columns:
        if there.count(column) != 1:
            raise ValueError(
                f"{table} has {there.count(column) or 'no'} columns {column!r}; it has {', '.join(there)}: name "
                "its own with --path-column, --label-column, --mask-column or --split-column."
            )
