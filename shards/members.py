"""The members of a WebDataset tar and where their bytes lie, read from its headers."""

from __future__ import annotations

import hashlib
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from bigtrain.data.schema import MASK_SUFFIX
from bigtrain.images import IMAGE_EXTENSIONS
from bigtrain.text import UNSAFE

META = re.compile(r"__[^/]*__(/|$)")  # what WebDataset passes over
KEY_AND_EXT = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # WebDataset: the first dot of the file name divides them
PICKLED = ("pyd", "pkl", "pickle", "pth", "pt")  # what WebDataset would unpickle, and so run; nothing here reads them
BEHIND = 2 * tarfile.BLOCKSIZE  # bytes that tarfile goes back at most
STEP = 1 << 20
MAX_READ = 1 << 30  # bytes of one member that is read; a damaged header may ask for terabytes


class RefusedError(tarfile.TarError):
    """A tar with a member that could lead out of its folder, or is not a plain file."""


class Member(NamedTuple):
    key: str
    ext: str  # as it is written; see is_image for its case
    offset: int  # of its bytes, behind the header
    size: int

    @property
    def name(self) -> str:
        return f"{self.key}.{self.ext}"

    @property
    def is_image(self) -> bool:
        return self.ext.lower() in IMAGE_EXTENSIONS

    @property
    def may_be_image(self) -> bool:
        """A picture like a.rgb.jpg, if its sample has no plain one."""
        ext = self.ext.lower()
        return "." in ext and ext != MASK_SUFFIX and ext.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS

    @property
    def is_pickle(self) -> bool:
        return self.ext.lower().rsplit(".", 1)[-1] in PICKLED


def members(file: Any, left_out: Counter[str] | None = None) -> Iterator[Member]:
    """Walk an uncompressed tar (a file or Digested).

    What WebDataset passes over is left out, and counted in `left_out` by its reason; folders are no members.

    Raises:
        RefusedError: a member's name leads out of the folder, or it is a link, a device or a sparse file.
        tarfile.TarError: the tar is truncated, compressed or no tar, or goes on behind the mark of its end.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps every member it has seen
                check_plain(info)
                found = KEY_AND_EXT.match(info.name)
                if found and info.isreg() and not META.match(info.name):
                    yield Member(found[1], found[2], info.offset_data, info.size)
                elif info.isreg() and left_out is not None:
                    left_out[reason_left_out(info.name)] += 1
            file.seek(tar.offset)  # tarfile mistakes a damaged header for the end
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"at byte {tar.offset} there is neither a member nor the mark of the end")
            check_nothing_behind(file, tar.offset)
    except (ValueError, OverflowError, struct.error, IndexError, KeyError, RecursionError) as error:
        raise tarfile.ReadError(f"a damaged header ({type(error).__name__}: {error})") from error


def reason_left_out(name: str) -> str:
    if META.match(name):
        return "named __...__"
    return "hidden" if PurePosixPath(name).name.startswith(".") else "without an extension"


def check_nothing_behind(file: Any, end: int) -> None:
    """Refuse bytes behind the mark of the end, which no reader of the tar would see."""
    at = end + tarfile.BLOCKSIZE
    while block := file.read(STEP):
        if block.strip(tarfile.NUL):
            at += len(block) - len(block.lstrip(tarfile.NUL))
            raise tarfile.ReadError(
                f"the mark of its end is at byte {end}, and there is more at byte {at}: it has a hole of zeros, or two "
                "tars were joined, which `tar --ignore-zeros -xf` unpacks"
            )
        at += len(block)


def check_plain(info: tarfile.TarInfo) -> None:
    name = info.name
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        raise RefusedError(f"its member {name!r} leads out of the folder")
    if UNSAFE.search(name):  # a newline, or bytes that are no UTF-8
        raise RefusedError(f"its member {name!r} has a name that cannot be printed")
    if not (info.isdir() or info.isreg()) or info.issparse():
        kind = "a link" if info.issym() or info.islnk() else "a sparse file" if info.issparse() else "a device"
        raise RefusedError(f"its member {name!r} is {kind}, and samples are plain files")
    if info.size < 0:
        raise tarfile.ReadError(f"its member {name!r} has {info.size} bytes")


class Digested:
    """A file read once, from start to end, for its sha256 and its members; it goes back two blocks at most."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0  # taken from the file so far
        self._behind = b""  # the last of them
        self._at = 0

    def tell(self) -> int:
        return self._at

    def seek(self, place: int) -> int:
        if place < self.bytes - len(self._behind):
            raise tarfile.ReadError(f"a header leads back from byte {self.bytes} to {place}")
        while self.bytes < place and self._take(min(STEP, place - self.bytes)):
            pass
        self._at = place
        return place

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MAX_READ:
            raise tarfile.ReadError(f"a member of {count} bytes at byte {self._at}")
        again = self.bytes - self._at
        first = self._behind[len(self._behind) - again :][:count] if again > 0 else b""
        parts = [first]
        wanted = count - len(first) if again >= 0 else 0
        while wanted and (data := self._take(min(wanted, 16 * STEP))):
            parts.append(data)
            wanted -= len(data)
        found = b"".join(parts)
        self._at += len(found)
        return found

    def finish(self) -> None:
        """Read what is behind the last member."""
        while self._take(STEP):
            pass

    def _take(self, count: int) -> bytes:
        data: bytes = self._file.read(count)
        self.sha256.update(data)
        self.bytes += len(data)
        self._behind = data[-BEHIND:] if len(data) >= BEHIND else (self._behind + data)[-BEHIND:]
        return data
