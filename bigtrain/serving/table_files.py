"""The table of `bigtrain score` as .parquet, .csv or .jsonl, written row by row and whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from bigtrain.files import whole_file

Row = dict[str, Any]
COLUMNS = ("path", "score", "p_value", "novel", "class", "why_not")
ROWS_AT_ONCE = 4096


def writer_for(path: Path) -> Callable[[IO[bytes], Iterable[Row]], None]:
    """Raises ValueError: the ending names no kind of table."""
    if (write := WRITERS.get(path.suffix)) is None:
        raise ValueError(f"--out {path}: the ending says the kind of table: {', '.join(WRITERS)}.")
    return write


def write_table(path: Path, rows: Iterable[Row]) -> None:
    write = writer_for(path)
    with whole_file(path) as file:
        write(file, rows)


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a table that `write_table` has written."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            yield from map(json.loads, file)
            return
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has not the columns {','.join(COLUMNS)}: it was changed; give another name.")
        for row in reader:
            numbers = {name: float(row[name]) if row[name] else None for name in ("score", "p_value")}
            novel = {"True": True, "False": False}.get(row["novel"])
            yield {**row, **numbers, "novel": novel, "class": row["class"] or None, "why_not": row["why_not"] or None}


def csv_line(row: Row) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(["" if row[name] is None else row[name] for name in COLUMNS])
    return line.getvalue().encode()


def json_line(row: Row) -> bytes:
    return (json.dumps({name: row[name] for name in COLUMNS}, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _csv(file: IO[bytes], rows: Iterable[Row]) -> None:
    file.write((",".join(COLUMNS) + "\n").encode())
    file.writelines(map(csv_line, rows))


def _jsonl(file: IO[bytes], rows: Iterable[Row]) -> None:
    file.writelines(map(json_line, rows))


def _parquet(file: IO[bytes], rows: Iterable[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    kinds = {"path": text, "score": number, "p_value": number, "novel": pa.bool_(), "class": text, "why_not": text}
    schema, rest = pa.schema(kinds), iter(rows)
    with pq.ParquetWriter(file, schema) as writer:
        while some := list(islice(rest, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


WRITERS: dict[str, Callable[[IO[bytes], Iterable[Row]], None]] = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}
