"""Where pictures to be scored come from: folders, patterns, shard sets, addresses, names on standard input ...

A source gives names, in a fixed order, and the bytes of each; names are listed first, so that a stopped command
continues with the same pictures in the same order.
"""

from __future__ import annotations

import glob
import os
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bigtrain.images import IMAGE_EXTENSIONS, UnreadableError
from bigtrain.serving.addresses import check_public, fetched, is_address

MANIFEST = "manifest.json"
MAX_FILE_BYTES = 1 << 30  # of a picture: more is no picture that could be decoded
T = TypeVar("T")


class Named(NamedTuple):
    """A picture: what the table calls it, and where its bytes are: a path or an address, or start and end in a tar."""

    name: str
    place: str
    start: int = -1
    end: int = -1
    classes: str = ""  # What it is known to show, comma-separated; of a file in a class folder, the folder's name.


def pictures_of(images: str, *, may_be_private: bool = False) -> Iterator[Named]:
    """The pictures that --images stands for, in a fixed order.

    Raises:
        ValueError: there are none.
    """
    if images == "-":
        lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
        return some((Named(line, line) for line in lines if line.strip()), "standard input has no names of pictures")
    if is_address(images):
        check_public(images, may_be_private=may_be_private)
    if is_address_of_picture(images):
        return iter([Named(images, images)])
    if is_address(images) or Path(images, MANIFEST).is_file():
        return of_shard_set(images)
    path = Path(images)
    if path.is_dir():
        return of_folder(path)
    if path.suffix == ".tar" and path.is_file():
        return some(of_tar(path), f"{images} has no pictures in it")
    if path.is_file():
        return iter([Named(images, images)])
    if glob.has_magic(images):
        found = (Path(name) for name in sorted(glob.glob(images, recursive=True)))  # noqa: PTH207  # of absolute ones too
        by_folder = glob.has_magic(str(Path(images).parent))
        files = (
            Named(str(file), str(file), classes=file.parent.name if by_folder else "")
            for file in found
            if file.is_file()
        )
        return some(files, f"nothing matches {images}")
    raise ValueError(f"--images {images} does not exist: give a folder, a pattern in quotes, a picture or a shard set.")


def is_address_of_picture(images: str) -> bool:
    """Whether an address is a picture's, by its ending; else it is a shard set's."""
    return is_address(images) and Path(images.partition("?")[0]).suffix[1:].lower() in IMAGE_EXTENSIONS


def some(names: Iterable[Named], otherwise: str) -> Iterator[Named]:
    """The same names; none is an error."""
    is_empty = True
    for named in names:
        is_empty = False
        yield named
    if is_empty:
        raise ValueError(f"{otherwise}: give a folder, a pattern in quotes, a picture or a shard set.")


def of_folder(folder: Path) -> Iterator[Named]:
    """The pictures in a folder and its folders, by name; hidden files are left out, and other kinds are counted."""
    others: Counter[str] = Counter()
    is_empty = True
    for file in files_below(folder):
        if file.suffix[1:].lower() in IMAGE_EXTENSIONS:
            is_empty = False
            yield Named(str(file), str(file), classes=file.parent.name if file.parent != folder else "")
        else:
            others[file.suffix.lower() or "no ending"] += 1
    kinds = ", ".join(f"{count} with {ending}" for ending, count in others.most_common(5))
    if is_empty:
        raise ValueError(
            f"--images {folder} holds no pictures{f', but other files ({kinds})' if others else ''}: pictures end in "
            f"{', '.join(IMAGE_EXTENSIONS[:6])} ..."
        )
    if others:
        print(f"{folder}: {others.total()} files are no pictures by their names, and are left out: {kinds}", flush=True)


def files_below(folder: Path) -> Iterator[Path]:
    """In the order of names; folders that are links too, each once.

    Raises:
        OSError: a folder cannot be listed: its pictures would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = set[tuple[int, int]]()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders[:] = []
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def of_shard_set(url: str) -> Iterator[Named]:
    """By the set's own keys; the place is its number."""
    from bigtrain.data.shard_set import ShardSet

    shard_set = ShardSet(url)
    for sample in range(len(shard_set)):
        yield Named(shard_set.key(sample), str(sample), classes=",".join(shard_set.classes_of(sample)))


def of_tar(path: Path) -> Iterator[Named]:
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and Path(member.name).suffix[1:].lower() in IMAGE_EXTENSIONS:
                    start = member.offset_data
                    yield Named(member.name, str(path), start, start + member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no readable tar ({error}): copy it again.") from error


def chunks(names: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(names)
    while some := list(islice(rest, size)):
        yield some


class Reader:
    """The bytes of pictures by what `pictures_of` gave; may be used from several threads.

    Args:
        images: what `pictures_of` was given.
        may_be_private: addresses in the private network are allowed.
    """

    def __init__(self, images: str, *, may_be_private: bool = False) -> None:
        self.may_be_private = may_be_private
        self.shard_set: Any = None
        self._of_thread = threading.local()
        if is_address(images):
            check_public(images, may_be_private=may_be_private)
        is_set = is_address(images) and not is_address_of_picture(images)
        if is_set or (images != "-" and Path(images, MANIFEST).is_file()):
            from bigtrain.data.shard_set import ShardSet

            self.shard_set = ShardSet(images)

    def read(self, named: Sequence[Named]) -> list[bytes | Exception]:
        """The bytes of some pictures, or why one cannot be read. A shard that cannot be read is raised: there is more
        than a picture missing."""
        if self.shard_set is not None:
            if not hasattr(self._of_thread, "reader"):
                self._of_thread.reader = self.shard_set.reader()
            places = self.shard_set.places(np.array([int(each.place) for each in named], np.int64))
            return self._of_thread.reader.read(*places)
        answers: list[bytes | Exception] = []
        for each in named:
            try:
                answers.append(self._read_one(each))
            except (OSError, UnreadableError) as error:
                answers.append(error)
        return answers

    def _read_one(self, named: Named) -> bytes:
        if is_address(named.place):
            return fetched(named.place, may_be_private=self.may_be_private)
        path = Path(named.place)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is no plain file" if path.exists() else "is missing"
            raise UnreadableError(f"not a picture: it {what}")
        start, end = (named.start, named.end) if named.start >= 0 else (0, path.stat().st_size)
        if end - start > MAX_FILE_BYTES:
            raise UnreadableError(f"not a picture: {end - start} bytes, and at most {MAX_FILE_BYTES} are read")
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)
