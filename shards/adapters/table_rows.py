"""The rows of a table (`table`), read from CSV or Parquet in batches."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from shards.keys import below
from shards.labels import names_of

KINDS = (".csv", ".tsv", ".parquet")


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
    if pa.types.is_floating(cells.type):
        cells = pc.if_else(pc.is_nan(cells), None, cells)
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        if not separator:
            raise ValueError("a column of lists needs a --separator: give one that no label holds.")
        words = pa.array([names_of(cell) for cell in cells.to_pylist()], pa.list_(pa.string()))
        if pc.any(pc.match_substring(pc.list_flatten(words), separator)).as_py():
            raise ValueError(f"a label holds the separator {separator!r}: give --separator another.")
        cells = pc.binary_join(words, separator)
    return pc.fill_null(cells.cast(pa.string()), "")


def from_root(root: Path, paths: pa.Array) -> pa.Array:
    """Paths from the root, a/b for ./a//b and for a\\b: a picture has one name."""
    paths = pc.replace_substring(paths, "\\", "/")
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
    with pyarrow.csv.open_csv(table, reading(table), parsing(table)) as file:
        return list(file.schema.names)


def reading(table: Path) -> pyarrow.csv.ReadOptions:
    with table.open("rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return pyarrow.csv.ReadOptions(use_threads=False, encoding="utf-16" if is_utf16 else "utf8")


def parsing(table: Path) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(delimiter="\t" if table.suffix.lower() == ".tsv" else ",", newlines_in_values=True)


def batches_of(table: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    there = columns_of(table)
    if there != (stripped := [name.strip() for name in there]) and not set(columns) <= set(there):
        yield from trimmed_batches(table, columns, there, stripped)
        return
    check_columns(table, columns, there)
    if table.suffix.lower() == ".parquet":
        with pq.ParquetFile(table) as file:
            yield from file.iter_batches(columns=columns, use_threads=False)
        return
    as_text = pyarrow.csv.ConvertOptions(
        include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
    )
    with pyarrow.csv.open_csv(table, reading(table), parsing(table), as_text) as file:
        yield from file


def trimmed_batches(table: Path, columns: list[str], there: list[str], stripped: list[str]) -> Iterator[pa.RecordBatch]:
    """Of a table with spaces behind its commas: names and cells without them."""
    check_columns(table, columns, stripped)
    for batch in batches_of(table, [there[stripped.index(name)] for name in columns]):
        yield pa.RecordBatch.from_arrays([pc.utf8_trim_whitespace(cells) for cells in batch.columns], columns)


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
