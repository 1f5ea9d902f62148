"""Rows of bytes, one an image, in a file that processes share: resized views, the teacher's tokens.

    <name>-<key>.rows    one slot an image of the shard set, at its number; slots not yet written are holes
    <name>-<key>.sums    for each slot its checksum and a mark, 8 bytes
    <name>-<key>.json    what the rows belong to

Keys tell apart what gives rows that differ by more than rounding. A row is used where its checksum fits, and is made
anew where it does not: a killed writer, a cut or damaged file and rows that another run is writing just now cost time
and no result. Whoever makes a row writes it, so that runs which begin together fill a cache together. Rows are read by
`pread` from the page cache, which all processes of a machine share: unlike a map of the file, it survives one that was
cut short.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.files import write_json
from bigtrain.text import clean

GIB = 2**30
SUM = struct.Struct("<II")  # CRC-32 of the row, MARK
MARK = 0x62745231
FORMAT = 1  # of the files, and of what makes their rows: raised where a change here would make other ones
MOST_OF_DISK = 0.8  # of what is free: checkpoints need room too


class RowCache:
    """Rows of `row_bytes` for the images of a shard set, by their numbers.

    May be sent to other processes: each opens the files for itself.

    Args:
        folder: where it lies; created. It may hold other caches.
        name: what the rows are, as in "views".
        belongs_to: all that the rows depend on, as plain JSON values.
        rows: images of the shard set.
    """

    def __init__(self, folder: Path, name: str, belongs_to: Mapping[str, Any], *, rows: int, row_bytes: int) -> None:
        self.rows, self.row_bytes, self.name = rows, row_bytes, name
        self.record = {"format": FORMAT, **belongs_to, "rows": rows, "row_bytes": row_bytes}
        key = hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"{name}-{key}"
        self.is_damaged, self.is_full = False, False
        self._told: set[str] = set()
        self._open: tuple[int, int, int] | None = None  # process, rows, sums

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def files(self) -> list[Path]:
        return [self.path.with_suffix(suffix) for suffix in (".rows", ".sums", ".json")]

    def exists(self) -> bool:
        return self.path.with_suffix(".json").is_file()

    def prepare(self, *, is_own: bool) -> str:
        """Create the files, on one rank.

        Args:
            is_own: the folder belongs to one run: caches of this name with another key have no use any more, and go.

        Returns:
            What a person should know; empty if nothing.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        said = []
        for other in sorted(self.path.parent.glob(f"{self.name}-*.json")) if is_own else []:
            if other.stem != self.path.name:
                said.append(f"the cached {self.name} in {self.path.parent} belong to {self._differs(other)}: made anew")
                for suffix in (".rows", ".sums", ".json"):
                    other.with_suffix(suffix).unlink(missing_ok=True)
        if self.exists():
            sizes = [file.stat().st_size if file.is_file() else 0 for file in self.files()[:2]]
            if sizes != [self.rows * self.row_bytes, self.rows * SUM.size]:
                said.append(
                    f"the cached {self.name} in {self.path.parent} were cut short: what is missing is made anew"
                )
        self._descriptors()
        self.close()
        write_json(self.path.with_suffix(".json"), self.record, "renamed")
        return "; ".join(said)

    def _differs(self, other: Path) -> str:
        try:
            there = json.loads(other.read_text())
        except (OSError, ValueError):
            return "something else"
        names = [name for name in self.record if there.get(name) != self.record[name] and name not in SIZES]
        return f"another {', another '.join(names)}" if names else "something else"

    def _descriptors(self) -> tuple[int, int]:
        if self._open is None or self._open[0] != os.getpid():
            descriptors = []
            for suffix, size in ((".rows", self.rows * self.row_bytes), (".sums", self.rows * SUM.size)):
                descriptor = os.open(self.path.with_suffix(suffix), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                if os.fstat(descriptor).st_size < size:
                    os.ftruncate(descriptor, size)  # a hole, which takes no room
                descriptors.append(descriptor)
            self._open = (os.getpid(), *descriptors)  # type: ignore[assignment]
        assert self._open is not None
        return self._open[1:]

    def has(self, number: int) -> bool:
        """Whether a row was written; its checksum may still not fit."""
        return self._sum(number)[1] == MARK

    def _sum(self, number: int) -> tuple[int, int]:
        """A row's checksum and mark; zeros where they cannot be read."""
        try:
            found = os.pread(self._descriptors()[1], SUM.size, number * SUM.size)
        except OSError:
            found = b""
        return SUM.unpack(found.ljust(SUM.size, b"\0"))

    def read(self, number: int, row: NDArray[np.uint8]) -> bool:
        """Read an image's row into contiguous bytes; False where it was never written or is not whole."""
        told, mark = self._sum(number)
        if mark != MARK:
            return False
        into = row.data.cast("B")
        try:
            is_whole = os.preadv(self._descriptors()[0], [into], number * self.row_bytes) == self.row_bytes
        except OSError:  # of a disk that fails: the row is made anew
            is_whole = False
        if is_whole and zlib.crc32(into) == told:
            return True
        self.is_damaged = True
        return False

    def write(self, number: int, row: NDArray[np.uint8]) -> None:
        """Keep an image's row; where there is no room, or the disk fails, this and all further ones are left out."""
        if self.is_full:
            return
        payload = np.ascontiguousarray(row).data.cast("B")
        try:
            rows, sums = self._descriptors()
            written = os.pwrite(rows, payload, number * self.row_bytes)
            if written == len(payload):
                os.pwrite(sums, SUM.pack(zlib.crc32(payload), MARK), number * SUM.size)
            else:
                self.is_full = True
        except OSError:
            self.is_full = True

    def news(self) -> list[str]:
        """What a person should know, each sentence once a process."""
        where = f"the cached {self.name} in {self.path.parent}"
        said = []
        if self.is_full:
            said.append(f"there is no room left for {where}, or the disk fails: the rest is made in each epoch")
        if self.is_damaged:
            said.append(f"some of {where} differ from their checksums: they are made anew")
        new = [sentence for sentence in said if sentence not in self._told]
        self._told |= set(new)
        return new

    def remove(self) -> None:
        """Delete the files; who still reads them finds no row any more."""
        self.close()
        for file in self.files():
            file.unlink(missing_ok=True)

    def close(self) -> None:
        if self._open is not None and self._open[0] == os.getpid():
            for descriptor in self._open[1:]:
                os.close(descriptor)
        self._open = None


SIZES = ("format", "rows", "row_bytes")


def why_no_room(folder: Path, needed_bytes: int, limit_gib: float, what: str) -> str:
    """Why rows do not go into a folder; empty if they do."""
    needed = f"{clean(what)} need {needed_bytes / GIB:.1f} GiB"
    if needed_bytes > limit_gib * GIB:
        return f"{needed}, more than --cache-gib {limit_gib:g} leaves: they are made in each epoch"
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed_bytes > MOST_OF_DISK * free:
        return f"{needed}, and {free / GIB:.1f} are free in {folder}: they are made in each epoch; see --cache-dir"
    return ""
