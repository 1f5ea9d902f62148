"""A shard set in memory: its manifest, its index as arrays, and the bytes of any image in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bigtrain.data.plan import MAX_SPAN, Plan
from bigtrain.data.reader import Places, Reader
from bigtrain.data.set_files import DIGEST, read_index, read_manifest, shards_url
from bigtrain.retry import DEFAULT, RetryPolicy

log = logging.getLogger(__name__)
SPAN_BYTES = 1 << 20  # of pictures, read at once: enough for a disk or a server to be worth the request
COLUMNS = ("key", "shard", "image_offset", "image_size", "width", "height", "classes", DIGEST)


class ShardSet:
    """The shard set at a folder or URL; `shard_set.read([3, 7])` gives two images' original bytes.

    Args:
        url: a folder, or any fsspec URL prefix.
        retry: how often, and how long, a disk or server is asked again.

    Raises:
        ValueError: there is no manifest, or a shard is not as long as the manifest says.
        OSError: the server does not answer.
    """

    def __init__(self, url: str, retry: RetryPolicy = DEFAULT) -> None:
        self.url, self._retry = str(url), retry
        self.manifest = read_manifest(self.url, retry)
        table = read_index(self.url, COLUMNS, retry)
        if table.num_rows != self.manifest.samples:
            raise ValueError(
                f"{url}: the index has {table.num_rows} rows and the manifest {self.manifest.samples} samples: "
                f"make the index again with `bigtrain-shards index {url}`."
            )
        shards = len(self.manifest.shards)
        if any(table[name].null_count for name in COLUMNS[:4]) or not _all_within(table["shard"], 0, shards - 1):
            raise ValueError(
                f"{url}: the index has rows without a place or in none of the manifest's {shards} shards: make it "
                f"again with `bigtrain-shards index {url}`."
            )
        self._key_N = table["key"]  # in chunks: a single array of strings holds 2 GiB at most
        self.shard_N: NDArray[np.int32] = _numbers(table["shard"])
        self._offset_N = _numbers(table["image_offset"])
        self._size_N = _numbers(table["image_size"])
        self._class_start_N, self._class_of_object, self._class_names = _encoded(table["classes"])
        self._digest_N: NDArray[np.uint64] | None = _numbers(table[DIGEST]) if DIGEST in table.column_names else None
        side_N = np.maximum(*(_numbers(_without_gaps(table[side])) for side in ("width", "height")))
        self.typical_side = int(np.median(side_N)) if len(side_N) else 0  # the median of the longer sides, in pixels
        self._reader = self.reader()
        self._check_sizes()

    def __len__(self) -> int:
        return len(self.shard_N)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.manifest.classes

    def key(self, sample: int) -> str:
        return self._key_N[int(sample)].as_py()

    def keys(self) -> list[str]:
        return self._key_N.to_pylist()

    def classes_of(self, sample: int) -> list[str]:
        """The distinct classes an image shows, sorted by name; none where nothing is annotated."""
        part = self._class_of_object[self._class_start_N[sample] : self._class_start_N[sample + 1]]
        return [self._class_names[c] for c in part]

    def shows_any(self, class_names: tuple[str, ...]) -> NDArray[np.bool_]:
        """Which samples show at least one of these classes: bool, shape (N,)."""
        wanted_C = np.isin(np.array(self._class_names, dtype=object), list(class_names))
        hits = np.concatenate([[0], np.cumsum(wanted_C[self._class_of_object])])
        return hits[self._class_start_N[1:]] > hits[self._class_start_N[:-1]]

    def classes_shown(self, sample_N: NDArray[np.int64]) -> set[str]:
        """The classes that these images show together."""
        is_counted_N = np.zeros(len(self), bool)
        is_counted_N[sample_N] = True
        is_counted = np.repeat(is_counted_N, np.diff(self._class_start_N))
        return {self._class_names[c] for c in np.unique(self._class_of_object[is_counted])}

    def shared_pictures(self, other: ShardSet) -> int:
        """How many pictures of this set are in another one too; see `also_in`."""
        return len(self.also_in(other, np.arange(len(self)), np.arange(len(other))))

    def also_in(self, other: ShardSet, sample_N: NDArray[np.int64], others_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of these samples have the very bytes of one of the other set's: copies, or the same places of a subset.

        By the digests in the indexes. An index of an earlier version has none: then only the same places of the same
        shards are found.
        """
        own, theirs = self._digest_N, other._digest_N
        if own is not None and theirs is not None:
            return sample_N[np.isin(own[sample_N], theirs[others_N])]
        common = {s.sha256 for s in self.manifest.shards} & {s.sha256 for s in other.manifest.shards}
        if not common or self is other:  # of one set, other samples are other places
            return sample_N[np.isin(sample_N, others_N)] if self is other else np.empty(0, np.int64)
        places = set(other._places(others_N))
        is_same = [place in places for place in self._places(sample_N)]
        return sample_N[np.array(is_same, bool)]

    def _places(self, sample_N: NDArray[np.int64]) -> list[tuple[str, int]]:
        files = [shard.sha256 for shard in self.manifest.shards]
        pairs = zip(self.shard_N[sample_N].tolist(), self._offset_N[sample_N].tolist(), strict=True)
        return [(files[number], offset) for number, offset in pairs]

    def first_class(self, class_names: Sequence[str]) -> NDArray[np.int64]:
        """The first of these classes that each sample shows, by its number among them; -1 where it shows none: (N,)."""
        number_of = {name: number for number, name in enumerate(class_names)}
        number_C = np.array([number_of.get(name, -1) for name in self._class_names], np.int64)
        number_of_object = np.append(number_C, -1)[self._class_of_object]
        row_of_object = np.repeat(np.arange(len(self)), np.diff(self._class_start_N))
        rows, places = np.unique(row_of_object[number_of_object >= 0], return_index=True)
        found_N = np.full(len(self), -1, np.int64)
        found_N[rows] = number_of_object[number_of_object >= 0][places]
        return found_N

    def plan(self, sample_N: NDArray[np.int64], global_batch: int, seed: int = 0, shuffle: bool = True) -> Plan:
        """The plan of an epoch over some of the samples, ascending, with spans as long as this set allows.

        A span is about SPAN_BYTES. If neighbours share a class more often than by chance, so would successive batches:
        each span is then one sample.
        """
        shard_N, size_N = self.shard_N[sample_N], self._size_N[sample_N]
        span_length = int(np.clip(SPAN_BYTES // max(size_N.mean(), 1), 1, MAX_SPAN)) if len(sample_N) else MAX_SPAN
        plan = Plan(sample_N, shard_N, global_batch, seed, shuffle, span_length)
        if span_length == 1 or not plan.in_spans or not self._is_sorted(sample_N):
            return plan
        log.warning(
            "%s: its shards are sorted by class, so pictures are read one by one; a set built with --shuffle-seed is "
            "read in larger pieces.",
            self.url,
            extra={"of_all_ranks": True},
        )
        return replace(plan, span_length=1)

    def _is_sorted(self, sample_N: NDArray[np.int64]) -> bool:
        """Whether neighbours in a shard show the same (first) class far more often than any two samples."""
        class_N = np.append(self._class_of_object, -1)[self._class_start_N[sample_N]]
        class_N[np.diff(self._class_start_N)[sample_N] == 0] = -1
        together = np.diff(self.shard_N[sample_N]) == 0
        share_C = np.bincount(class_N + 1) / len(class_N)
        by_chance = float(np.square(share_C).sum())
        return bool(np.mean(np.diff(class_N)[together] == 0) > by_chance + 0.2 * (1 - by_chance))

    def places(self, sample_N: NDArray[np.int64]) -> Places:
        """Where the pictures of some samples lie: their shards, and offsets and sizes in bytes.

        One picture of each shard, the first, comes with its key: looking up all would take longer than reading.
        """
        shard_N = self.shard_N[sample_N]
        key_N = np.full(len(shard_N), None, object)
        for first in np.unique(shard_N, return_index=True)[1].tolist():
            key_N[first] = self.key(sample_N[first])
        return Places(shard_N, self._offset_N[sample_N], self._size_N[sample_N], key_N)

    def reader(self) -> Reader:
        """What reads by `places`, in this process or in a worker, which needs no index for it."""
        files = [shard.file for shard in self.manifest.shards]
        return Reader(shards_url(self.url, self.manifest), files, self._retry)

    def read(self, samples: Sequence[int]) -> list[bytes]:
        """The original bytes of some images, in the order asked for; a shard that cannot be read stops the run."""
        try:
            places = self.places(np.asarray(samples, np.int64))
            return self._reader.read(*places._replace(key_N=np.array([*map(self.key, samples), None], object)[:-1]))
        except OSError as error:
            raise self.naming_keys(error, samples) from error

    def naming_keys(self, error: OSError, samples: Sequence[int] | NDArray[np.int64]) -> OSError:
        """The same error about a shard, with the keys that it was to give."""
        keys = [self.key(s) for s in samples if f"/{self.manifest.shards[self.shard_N[s]].file}" in str(error)]
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        return type(error)(f"{error} It was to give {', '.join(keys[:3])}{more}." if keys else str(error))

    def _check_sizes(self) -> None:
        """Compare the shards' sizes with the manifest's, where the file system lists them (HTTP does not)."""
        if (found := self._reader.sizes()) is None:
            return
        for shard in self.manifest.shards:
            if (size := found.get(shard.file)) != shard.bytes:
                what = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"{shards_url(self.url, self.manifest)}/{shard.file} {what}, and the manifest says {shard.bytes}: "
                    f"copy it again or build the set again (`bigtrain-shards check {self.url}` lists everything that "
                    "is wrong)."
                )


def _all_within(column: pa.ChunkedArray, low: int, high: int) -> bool:
    found = pc.min_max(column).as_py()
    return found["min"] is None or (low <= found["min"] and found["max"] <= high)


def _numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """A column without gaps as an array; pyarrow's own `to_numpy` would first import pandas, where there is one."""
    return np.from_dlpack(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)


def _without_gaps(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers, 0 where there is none; `fill_null` would import pandas too, so it is called where there are gaps."""
    return pc.fill_null(column, 0) if column.null_count else column


def _encoded(classes: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.int32], list[str]]:
    """Lists of names as numbers: where each list starts (and the last ends), the numbers in them, the names."""
    count_N = _numbers(_without_gaps(pc.list_value_length(classes)))
    names = pc.list_flatten(classes).dictionary_encode().combine_chunks()
    return np.concatenate([[0], np.cumsum(count_N)]), _numbers(names.indices), names.dictionary.to_pylist()
