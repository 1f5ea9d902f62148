"""Bytes of local and remote files: time limits, retries, clear errors.

A shard set lies on a disk or behind any fsspec URL, and both fail: a disk loses a file, a server is busy, slow, silent,
or closes the connection in mid-answer. Transient errors are retried, permanent ones are raised at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import posixpath
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from bigtrain.files import entries
from bigtrain.retry import RetryPolicy, described, http_status, is_permanent

log = logging.getLogger(__name__)
MAX_OPEN_FILES = 64  # far below the usual limit
MAX_REQUESTS = 16  # at once, of one process
SLOWEST_BYTES_PER_S = 250_000  # anything slower times out
FIRST_PIECE_BYTES, MAX_PIECE_BYTES = 256 << 10, 32 << 20  # of a file that is read whole


class Range(NamedTuple):
    """Bytes start .. end - 1 of a file."""

    path: str
    start: int
    end: int


class LocalFiles:
    """Files of this machine, kept open between reads; pickled closed."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def get(self, ranges: Sequence[Range]) -> list[bytes | BaseException]:
        answers: list[bytes | BaseException] = []
        for path, start, end in ranges:
            try:
                answers.append(os.pread(self._descriptor(path), end - start, start))
            except OSError as error:
                self._close(path)  # a network disk may ask for the file to be reopened
                answers.append(error)
        return answers

    def size(self, path: str) -> int | None:
        """None if unavailable: reading will say why."""
        try:
            return Path(path).stat().st_size
        except OSError:
            return None

    def sizes(self, folder: str) -> dict[str, int] | None:
        return entries(Path(folder))

    def name(self, path: str) -> str:
        return path

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                self._close(next(iter(self._open)))
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def _close(self, path: str) -> None:
        if path in self._open:
            os.close(self._open.pop(path))

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}}

    def __del__(self) -> None:
        for path in list(self._open):
            self._close(path)


class RemoteFiles:
    """Files behind an fsspec file system; several requests at once where it can. Its connections are not pickled."""

    def __init__(self, fs: fsspec.AbstractFileSystem, timeout_s: float) -> None:
        self._fs, self._timeout_s = fs, timeout_s
        self._limit = {"timeout": timeout_s} if isinstance(fs, AsyncFileSystem) else {}  # of every fsspec call

    def get(self, ranges: Sequence[Range]) -> list[bytes | BaseException]:
        # concurrent requests share the bandwidth, so each may take as long as all together
        largest = sorted((end - start for _, start, end in ranges), reverse=True)[:MAX_REQUESTS]
        limit_s = self._timeout_s + sum(largest) / SLOWEST_BYTES_PER_S
        if isinstance(self._fs, AsyncFileSystem):
            return sync(self._fs.loop, self._get_together, ranges, limit_s)
        return [self._get_one(r) for r in ranges]

    async def _get_together(self, ranges: Sequence[Range], limit_s: float) -> list[bytes | BaseException]:
        gate = asyncio.Semaphore(MAX_REQUESTS)

        async def get(wanted: Range) -> bytes:
            async with gate:
                request = self._fs._cat_file(wanted.path, start=wanted.start, end=wanted.end)
                try:
                    return await asyncio.wait_for(request, limit_s)
                except TimeoutError as error:
                    raise TimeoutError(f"no whole answer within {limit_s:.0f} s") from error

        return await asyncio.gather(*map(get, ranges), return_exceptions=True)

    def _get_one(self, wanted: Range) -> bytes | BaseException:
        try:
            return self._fs.cat_file(wanted.path, start=wanted.start, end=wanted.end)
        except Exception as error:  # each file system has errors of its own
            return error

    def size(self, path: str) -> int | None:
        """None where the server does not say, or not now: reading will say why."""
        try:
            self._fs.invalidate_cache(posixpath.dirname(path))
            return self._fs.info(path, **self._limit)["size"]
        except Exception:  # each file system has errors of its own
            return None

    def sizes(self, folder: str) -> dict[str, int] | None:
        """Bytes of each file in a folder, by name; None where the server does not list them, or not to us."""
        if "http" in self._fs.protocol:  # a page of links at best
            return None
        try:
            self._fs.invalidate_cache(folder)
            there = self._fs.ls(folder, detail=True, **self._limit)
        except FileNotFoundError:
            return {}
        except Exception as error:  # each file system has errors of its own; reading will say what is wrong
            log.info("%s is not listed (%s): its files' sizes are not checked", self.name(folder), described(error))
            return None
        sizes = {posixpath.basename(entry["name"]): entry["size"] for entry in there}
        return None if None in sizes.values() else sizes

    def name(self, path: str) -> str:
        return self._fs.unstrip_protocol(path)


Files = LocalFiles | RemoteFiles


def files_of(fs: fsspec.AbstractFileSystem, policy: RetryPolicy) -> Files:
    return LocalFiles() if isinstance(fs, LocalFileSystem) else RemoteFiles(fs, policy.timeout_s)


def fetch(files: Files, ranges: Sequence[Range], policy: RetryPolicy, *, whole: bool = True) -> list[bytes]:
    """The bytes of each range, in the order asked for; only what failed is asked for again.

    Args:
        whole: False: an answer may be short, or empty, because the file ends there.

    Raises:
        FileNotFoundError, PermissionError, OSError: a file is missing, may not be read, is shorter than the ranges say,
            or failed `policy.attempts` times.
    """
    answers: list[bytes] = [b""] * len(ranges)
    wanted = list(range(len(ranges)))
    for attempt in range(1, policy.attempts + 1):
        failed: dict[int, BaseException] = {}
        for i, answer in zip(wanted, files.get([ranges[i] for i in wanted]), strict=True):
            asked = ranges[i].end - ranges[i].start
            is_past_end = isinstance(answer, BaseException) and http_status(answer) == 416
            if is_past_end and not whole:
                continue
            if isinstance(answer, bytes) and (len(answer) == asked or not whole):
                answers[i] = answer
                continue
            if isinstance(answer, bytes) or is_past_end:
                _check_cut(files, ranges[i], len(answer) if isinstance(answer, bytes) else 0)
            problem = OSError(f"{len(answer)} of {asked} bytes came") if isinstance(answer, bytes) else answer
            if is_permanent(problem) or attempt == policy.attempts:
                raise _stop(files, ranges[i].path, problem, attempt) from problem
            failed[i] = problem
        if not failed:
            return answers
        wanted = list(failed)
        wait_s = policy.wait_s(attempt)
        first = wanted[0]
        log.warning(
            "%s: %s%s; attempt %d of %d in %.1f s",
            files.name(ranges[first].path),
            described(failed[first]),
            f", and {len(wanted) - 1} more requests failed" if len(wanted) > 1 else "",
            attempt + 1,
            policy.attempts,
            wait_s,
        )
        time.sleep(wait_s)
    raise AssertionError("unreachable")


def fetch_file(files: Files, path: str, policy: RetryPolicy) -> bytes:
    """A whole file, in growing pieces: a cut connection costs one of them, and a small file has a short time limit."""
    size = files.size(path)  # without it, an answer that was cut short would look like the file's end
    pieces: list[bytes] = []
    start, step = 0, FIRST_PIECE_BYTES
    while size is None or start < size:
        end = start + step if size is None else min(start + step, size)
        pieces += fetch(files, [Range(path, start, end)], policy, whole=size is not None)
        if len(pieces[-1]) != end - start:
            break  # the end; or a server that ignores ranges, which has answered the first request with everything
        start, step = end, min(step * 2, MAX_PIECE_BYTES)
    return b"".join(pieces)


def _check_cut(files: Files, wanted: Range, came: int) -> None:
    """Raise what no retry can fix: the file is too short, or its server supports no ranges."""
    name = files.name(wanted.path)
    if came > wanted.end - wanted.start:
        raise OSError(
            f"{name}: the server sent {came} bytes where {wanted.end - wanted.start} were asked for, so it serves no "
            "byte ranges: use a server that does (nginx, S3), or copy the shards to a disk."
        )
    if (size := files.size(wanted.path)) is not None and size < wanted.end:
        raise OSError(
            f"{name} has {size} bytes, and bytes {wanted.start} to {wanted.end} were to be read: the file was cut or "
            "changed after its index was made. Copy it again, or make the index again with `bigtrain-shards index`."
        )


def _stop(files: Files, path: str, error: BaseException, attempts: int) -> OSError:
    name, status = files.name(path), http_status(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
        return FileNotFoundError(f"{name} is missing ({described(error)}): copy it there, or check the address.")
    if isinstance(error, PermissionError) or status in (401, 403):
        text = f"{name} may not be read ({described(error)}): check the rights of the file or your credentials."
        return PermissionError(text)
    tried = "once" if attempts == 1 else f"{attempts} times"
    return OSError(f"{name} cannot be read: tried {tried}; last error: {described(error)}.")
