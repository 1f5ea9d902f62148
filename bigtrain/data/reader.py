"""Pictures by their byte ranges in the shards: near ones in one large read, far ones apart."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.fetch import LocalFiles, Range, fetch, files_of
from bigtrain.data.schema import may_be_of
from bigtrain.data.set_files import filesystem
from bigtrain.retry import DEFAULT, RetryPolicy

MAX_GAP_BYTES = 64 << 10  # bytes transferred in the time of one more request; headers and labels are far smaller
MAX_RANGE_BYTES = 8 << 20  # longer runs are several requests, which go at once
MAX_LOCAL_GAP_BYTES = 4 << 10
MAX_LOCAL_RANGE_BYTES = 128 << 10  # a disk reads ahead by itself, and cutting a long range up costs more than a read


class Places(NamedTuple):
    """Where pictures lie, and the keys of some of them, by which the reader knows whether a tar is the index's own."""

    shard_N: NDArray[np.int32]
    offset_N: NDArray[np.int64]
    size_N: NDArray[np.int64]
    key_N: NDArray[np.object_]  # None: not to be compared

    def those(self, which_N: NDArray[np.bool_]) -> Places:
        return Places(self.shard_N[which_N], self.offset_N[which_N], self.size_N[which_N], self.key_N[which_N])


class Reader:
    """Reads pictures of one shard set by (shard, offset, size); small, and pickled to workers without open files.

    Args:
        url: the folder or URL prefix where the shards lie.
        files: their names, by number.
        retry: how often, and how long, a disk or server is asked again.

    `bytes_read` counts what was read since it was made or unpickled, gaps included. Not thread-safe.
    """

    def __init__(self, url: str, files: Sequence[str], retry: RetryPolicy = DEFAULT) -> None:
        fs, self._path = filesystem(url)
        self._names, self._retry = tuple(files), retry
        self._files = files_of(fs, retry)
        is_local = isinstance(self._files, LocalFiles)
        self._max_gap = MAX_LOCAL_GAP_BYTES if is_local else MAX_GAP_BYTES
        self._max_range = MAX_LOCAL_RANGE_BYTES if is_local else MAX_RANGE_BYTES
        self._checked: set[str] = set()  # shards
        self.bytes_read = 0

    def read(
        self,
        shard_N: NDArray[np.int32],
        offset_N: NDArray[np.int64],
        size_N: NDArray[np.int64],
        key_N: NDArray[np.object_] | None = None,
    ) -> list[bytes]:
        """The bytes of some pictures, in the order asked for; what cannot be read stops with an OSError."""
        start_N, size = offset_N.tolist(), size_N.tolist()
        keys: list[str | None] = [None] * len(size) if key_N is None else key_N.tolist()
        order_N = np.lexsort((offset_N, shard_N)).tolist()
        ranges, members = self._merged(shard_N.tolist(), start_N, size, keys, order_N)
        pictures: list[bytes] = [b""] * len(start_N)
        for (path, first, end), places, data in zip(
            ranges, members, fetch(self._files, ranges, self._retry), strict=True
        ):
            self.bytes_read += end - first
            if path not in self._checked:
                self._check_header(path, data, size[places[0]])
            for i in places:
                start = start_N[i] - first
                key = keys[i]
                if key is not None and not may_be_of(data[max(start - tarfile.BLOCKSIZE, 0) : start], key):
                    raise self._other_pictures(path)
                pictures[i] = data[start : start + size[i]]  # the whole of `data` is not copied
        return pictures

    def _check_header(self, path: str, data: bytes, size: int) -> None:
        """Compare a member's header in the tar with the index, once for each shard.

        A shard that was built again may have other pictures at the places of the old.
        """
        try:
            found = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            found = -1
        if found != size:
            raise self._other_pictures(path)
        self._checked.add(path)

    def _other_pictures(self, path: str) -> OSError:
        return OSError(
            f"{self._files.name(path)} has other pictures than its index says: it was changed after its index was "
            "made. Copy both again, or make the index again with `bigtrain-shards index`."
        )

    def sizes(self) -> dict[str, int] | None:
        """Bytes of the files beside the shards, by name; None where the file system does not list them."""
        return self._files.sizes(self._path)

    def _merged(
        self, shard_N: list[int], start_N: list[int], size_N: list[int], key_N: list[str | None], order_N: list[int]
    ) -> tuple[list[Range], list[list[int]]]:
        """The ranges to read, neighbours together, and which pictures lie in each."""
        ranges: list[Range] = []
        members: list[list[int]] = []
        shard = first = end = -1
        for i in order_N:
            start, stop = start_N[i], start_N[i] + size_N[i]
            if shard_N[i] == shard and start - end <= self._max_gap and stop - first <= self._max_range:
                end = max(end, stop)
                ranges[-1] = ranges[-1]._replace(end=end)
                members[-1].append(i)
            else:
                shard, first, end = shard_N[i], start, stop
                path = f"{self._path}/{self._names[shard]}"
                is_new = path not in self._checked and (not ranges or path != ranges[-1].path)
                if is_new or key_N[i] is not None:
                    first = max(first - tarfile.BLOCKSIZE, 0)  # the header of its member, see _check_header
                ranges.append(Range(path, first, end))
                members.append([i])
        return ranges, members

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_checked": set(), "bytes_read": 0}
