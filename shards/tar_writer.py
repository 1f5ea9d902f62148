"""A shard's tar, written once from start to end, and its SHA-256 and those of its pictures, computed beside it."""

from __future__ import annotations

import hashlib
import tarfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from shards.disk import start_writing
from shards.duplicates import content_digest

RECORD = 10240  # a tar ends on a multiple of this
AHEAD_BYTES = 16 << 20  # written by the program before the disk is asked to begin
BATCH_BYTES = 1 << 20  # handed to the hashing thread at once
WAITING_BYTES = 16 << 20  # written and not hashed yet, at most; so much evens out which of the two is slower
MAX_PLAIN_BYTES = 8**11 - 1  # that a plain header can say


class TarWriter:
    """A tar with fixed time, owner and mode, which knows where it puts each member's bytes.

    Hashing takes as long as all else together, and hashlib lets other threads run meanwhile: a thread hashes a batch
    of members while the next are read and written, and the last while the disk syncs.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.bytes = 0
        self._given_bytes = 0  # to the disk
        self._hashes = Hashes()
        self._thread = ThreadPoolExecutor(1)
        self._batch: list[tuple[bytes, bool]] = []  # what was written, and whether it is a picture
        self._batch_begin = 0
        self._hashing: deque[tuple[int, Future[None]]] = deque()  # batches, by where they begin

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False)

    def _write(self, data: bytes, is_picture: bool = False) -> None:
        self.file.write(data)
        self.bytes += len(data)
        self._batch.append((data, is_picture))

    def add(self, name: str, data: bytes, is_picture: bool = False) -> int:
        """Append a member and return the offset of its bytes."""
        self._write(header(name, len(data)))
        offset = self.bytes
        self._write(data, is_picture)
        self._write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        if self.bytes - self._batch_begin >= BATCH_BYTES:
            self._hand_over()
        if self.bytes - self._given_bytes >= AHEAD_BYTES:
            start_writing(self.file)
            self._given_bytes = self.bytes
        return offset

    def close(self) -> None:
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._write(b"\0" * (-self.bytes % RECORD))
        self._hand_over()

    def hashes(self) -> Hashes:
        """Of the closed tar; waits for the last batches."""
        for _, batch in self._hashing:
            batch.result()
        return self._hashes

    def _hand_over(self) -> None:
        while self._hashing and self.bytes - self._hashing[0][0] > WAITING_BYTES:
            self._hashing.popleft()[1].result()
        self._hashing.append((self._batch_begin, self._thread.submit(self._hashes.add, self._batch)))
        self._batch, self._batch_begin = [], self.bytes


class Hashes:
    """SHA-256 of a tar, and of each picture in it, fed batch by batch."""

    def __init__(self) -> None:
        self.tar = hashlib.sha256()
        self.pictures: list[int] = []  # content_digest of each, in order

    def add(self, batch: list[tuple[bytes, bool]]) -> None:
        for data, is_picture in batch:
            self.tar.update(data)
            if is_picture:
                self.pictures.append(content_digest(data))


def header(name: str, size: int) -> bytes:
    """A member's header, as tarfile makes it of these, in a tenth of the time: most fields are always the same."""
    is_plain = len(name) <= tarfile.LENGTH_NAME and size <= MAX_PLAIN_BYTES
    if not (is_plain and name.isascii()):
        return tarfile_header(name, size, is_plain=is_plain)
    encoded = name.encode()
    digits = b"%011o" % size
    checksum = b"%06o" % (BLANK_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(100, b"\0"), BLANK[100:124], digits, BLANK[135:148], checksum, BLANK[154:]))


def tarfile_header(name: str, size: int, is_plain: bool) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT if is_plain else tarfile.PAX_FORMAT)


BLANK = tarfile_header("", 0, is_plain=True)
# of a header's bytes where its own field counts as spaces, less the digits of the size
BLANK_SUM = int(BLANK[148:154], 8) - sum(BLANK[124:135])
