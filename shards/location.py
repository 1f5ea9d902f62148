"""Where a shard set lies: a folder, or a URL prefix of any fsspec file system; files appear whole or not at all.

A folder gets a temporary file that is synced and renamed. An object store shows an object whole or not at all, so a
file is written to a nameless temporary file here and then uploaded; transient errors are retried.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from bigtrain.data.set_files import filesystem
from bigtrain.files import Strength, entries, remove_abandoned, remove_unfinished, whole_file
from bigtrain.retry import RetryPolicy, described, is_permanent, retried
from shards.disk import locked_folder, space_for

RETRY = RetryPolicy(attempts=5)
PIECE_BYTES = 16 << 20  # of one request when a remote file is read from its start to its end

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Location:
    url: str

    @cached_property
    def fs(self) -> fsspec.AbstractFileSystem:
        return filesystem(self.url)[0]

    @cached_property
    def path(self) -> str:
        return filesystem(self.url)[1]

    @property
    def folder(self) -> Path | None:
        """The folder on this machine; None behind a URL."""
        return Path(self.path) if isinstance(self.fs, LocalFileSystem) else None

    @property
    def of_one_process(self) -> bool:
        return isinstance(self.fs, MemoryFileSystem)

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}  # connections are not pickled

    def __str__(self) -> str:
        return self.url

    def check_writable(self) -> None:
        protocols = (self.fs.protocol,) if isinstance(self.fs.protocol, str) else self.fs.protocol
        if {"http", "https"} & set(protocols):
            raise ValueError(
                f"{self.url} cannot be written, because web servers are read-only: use a folder or s3://, gs:// ..., "
                "and serve that."
            )

    def prepare(self, *folders: str) -> None:
        """Make the folder, which is all ours, and these in it, without the temporary files of a run that was killed."""
        if self.folder is None:
            return
        for name in ("", *folders):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder / name)

    def prepare_among_others(self, *names: str) -> None:
        """Remove what killed writers of these files left in a folder that holds files of others."""
        if self.folder is not None:
            remove_abandoned(self.folder, *names)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Refuse a second build in a folder. Behind a URL nothing can be locked: two there write the same bytes."""
        return locked_folder(self.folder) if self.folder is not None else contextlib.nullcontext()

    def sizes(self, inner: str = "") -> dict[str, int]:
        """The names in it, or in its folder `inner`, and their bytes (a folder: 0); empty where nothing is there."""
        if self.folder is not None:
            return entries(self.folder / inner)
        path = f"{self.path}/{inner}".rstrip("/")
        try:
            found = self._request("listed", path, lambda: self.fs.ls(path, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry.get("size") or 0 for entry in found}

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where it is missing or its server does not say."""
        try:
            return self._request("read", f"{self.path}/{name}", lambda: self.fs.size(f"{self.path}/{name}"))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        return self._request("read", f"{self.path}/{name}", lambda: self.fs.cat_file(f"{self.path}/{name}"))

    def read_range(self, name: str, start: int, size: int) -> bytes:
        if self.folder is not None:
            with (self.folder / name).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), size, start)
        path = f"{self.path}/{name}"
        return self._request("read", path, lambda: self.fs.cat_file(path, start=start, end=start + size))

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[IO[bytes] | Pieces]:
        """A file to be read from its start to its end."""
        if self.folder is not None:
            with (self.folder / name).open("rb", buffering=1 << 20) as file:
                yield file
        else:
            yield Pieces(self, name)

    @contextlib.contextmanager
    def written(self, name: str, strength: Strength = "durable") -> Iterator[IO[bytes]]:
        """A file to write; it appears when the block is left without an error."""
        if self.folder is not None:
            with whole_file(self.folder / name, strength) as file:
                yield file
            return
        with tempfile.TemporaryFile(prefix="bigtrain-") as file:
            with space_for(f"{tempfile.gettempdir()} (TMPDIR names another folder)"):
                yield file
                file.flush()
            self._upload(file, f"{self.path}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with what is in it; it may be missing."""
        path = f"{self.path}/{name}"
        if self.folder is None:
            with contextlib.suppress(FileNotFoundError):
                self._request("removed", path, lambda: self.fs.rm(path, recursive=True))
        elif Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    def _upload(self, file: IO[bytes], path: str) -> None:
        size = os.fstat(file.fileno()).st_size

        def upload() -> None:
            if size < PIECE_BYTES:
                file.seek(0)
                self.fs.pipe_file(path, file.read())
            else:
                self.fs.put_file(f"/dev/fd/{file.fileno()}", path)
            self.fs.invalidate_cache()
            there = self.fs.size(path)
            if there != size:
                raise OSError(f"{there} bytes arrived of {size}")

        self._request("written", path, upload)

    def _request(self, what: str, path: str, request: Callable[[], Answer]) -> Answer:
        """Make a request to a server, with retries; the final failure is one sentence."""
        if self.folder is not None:
            return request()
        name = self.fs.unstrip_protocol(path)
        try:
            return retried(request, RETRY, lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True))
        except FileNotFoundError as error:  # often a missing bucket
            raise FileNotFoundError(f"{name} cannot be {what} ({described(error)}): check the address.") from error
        except Exception as error:  # each file system has errors of its own
            if is_permanent(error):
                raise OSError(
                    f"{name} cannot be {what} ({described(error)}): check the address and your rights there."
                ) from error
            raise OSError(
                f"{name} cannot be {what}: tried {RETRY.attempts} times; last error: {described(error)}. Run the same "
                "command again later."
            ) from error


class Pieces:
    """A remote file, read from its start to its end in large requests, each tried again where it fails."""

    def __init__(self, place: Location, name: str) -> None:
        self._place, self._path = place, f"{place.path}/{name}"
        size = place.size(name)
        if size is None:
            raise OSError(f"{place.url}/{name} is missing, or its server does not say how large it is.")
        self.size = size
        self._asked = 0  # bytes
        self._ahead = memoryview(b"")

    def read(self, count: int) -> bytes:
        parts: list[memoryview] = []
        while count and (self._ahead or self._asked < self.size):
            if not self._ahead:
                self._ahead = memoryview(self._place._request("read", self._path, self._next_piece))
                self._asked += len(self._ahead)
            parts.append(self._ahead[:count])
            self._ahead = self._ahead[count:]
            count -= len(parts[-1])
        return b"".join(parts)

    def _next_piece(self) -> bytes:
        end = min(self.size, self._asked + PIECE_BYTES)
        data = self._place.fs.cat_file(self._path, start=self._asked, end=end)
        if len(data) > end - self._asked:
            raise NotImplementedError("the server serves no byte ranges")
        if len(data) < end - self._asked:
            raise OSError(f"{len(data)} bytes came where {end - self._asked} were asked for")
        return data
