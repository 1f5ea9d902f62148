"""index.parquet, written shard by shard, and how repeated keys or contents are found among all rows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bigtrain.data.set_files import WRITTEN_SCHEMA

ROWS_PER_GROUP = 65536


class IndexWriter:
    """Rows in shard order to full row groups; at most about one group is held in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.writer = pq.ParquetWriter(file, WRITTEN_SCHEMA)
        self.waiting: list[pa.Table] = []
        self.rows_waiting = 0

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # Arrow would write to the closed file later
            with contextlib.suppress(OSError, ValueError):
                self.writer.close()

    def add(self, rows: list[dict[str, Any]], shard: int) -> None:
        self.waiting.append(pa.Table.from_pylist([{**row, "shard": shard} for row in rows], schema=WRITTEN_SCHEMA))
        self.rows_waiting += len(rows)
        if self.rows_waiting >= ROWS_PER_GROUP:
            self._write(self.rows_waiting // ROWS_PER_GROUP * ROWS_PER_GROUP)

    def close(self) -> None:
        if self.rows_waiting:
            self._write(self.rows_waiting)
        self.writer.close()
        self.file.flush()

    def _write(self, count: int) -> None:
        table = pa.concat_tables(self.waiting)
        self.writer.write_table(table.slice(0, count), row_group_size=ROWS_PER_GROUP)
        self.waiting = [table.slice(count).combine_chunks()]
        self.rows_waiting -= count


def columns_at(file: IO[bytes], rows: NDArray[np.int64], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some rows of a written index, given and returned in rising order, read group by group."""
    file.seek(0)
    parquet = pq.ParquetFile(file, pre_buffer=False)
    begin = 0
    for group in range(parquet.num_row_groups):
        end = begin + parquet.metadata.row_group(group).num_rows
        wanted = rows[(rows >= begin) & (rows < end)] - begin
        if len(wanted):
            yield from parquet.read_row_group(group, list(names), use_threads=False).take(pa.array(wanted)).to_pylist()
        begin = end


def repeated(hashes_N: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """The places of equal hashes, two or more in a group, each in rising order; groups by their first place."""
    order_N = np.argsort(hashes_N, kind="stable")
    _, starts, lengths = np.unique(hashes_N[order_N], return_index=True, return_counts=True)
    is_more = lengths > 1
    groups = [order_N[start : start + n] for start, n in zip(starts[is_more], lengths[is_more], strict=True)]
    return sorted(groups, key=lambda group: int(group[0]))


def hash64(text: str, seed: str = "") -> int:
    """64 bits that stand for a text; the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8, key=seed.encode())
    return int.from_bytes(digest.digest(), "big")
