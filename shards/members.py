"""The members of a WebDataset tar and where their bytes lie, read from its headers."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from bigtrain.data.schema import IMAGE_EXTENSIONS

KEY_AND_EXT = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # WebDataset: the first dot of the file name divides them

META = re.compile(r"__[^/]*__(/|\.|$)")  # what WebDataset passes over: __meta__.json and the like


@dataclass(frozen=True)
class Member:
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


def members(file: IO[bytes]) -> Iterator[Member]:
    """Walk an uncompressed tar; whatever is no <key>.<ext> (folders, links, .hidden files) belongs to no sample.

    Raises tarfile.TarError where the tar is truncated, compressed or no tar.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            found = KEY_AND_EXT.match(info.name)
            if found and info.isreg() and not META.match(info.name):
                yield Member(found[1], found[2], info.offset_data, info.size)
        file.seek(tar.offset)  # tarfile takes a damaged header for the end
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"at byte {tar.offset} there is neither a member nor the mark of the end")
