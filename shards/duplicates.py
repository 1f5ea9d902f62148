"""Pictures with the same bytes under several keys: candidates by 64 bits of a digest, then compared in full."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.schema import Shard
from shards.index_file import columns_at, repeated
from shards.location import Location


def content_digest(encoded: bytes) -> int:
    """64 bits of the SHA-256 of a picture."""
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big")


@dataclass
class Equals:
    """Pictures of the same bytes, in the order of the set."""

    keys: list[str] = field(default_factory=list)
    labels: set[tuple[str, ...]] = field(default_factory=set)


def duplicates(out: Location, index: IO[bytes], digests_N: NDArray[np.uint64], shards: Sequence[Shard]) -> list[Equals]:
    """The groups of equal pictures; only candidates are read again.

    Args:
        index: the written index.
        digests_N: content_digest of each of its rows.
    """
    groups = repeated(digests_N)
    if not groups:
        return []
    group_of = {int(row): number for number, group in enumerate(groups) for row in group}
    rows = np.sort(np.concatenate(groups))
    names = ["key", "shard", "image_offset", "image_size", "classes"]
    same: dict[tuple[int, bytes], Equals] = {}
    for number, row in zip(rows, columns_at(index, rows, names), strict=True):
        encoded = out.read_range(shards[row["shard"]].file, row["image_offset"], row["image_size"])
        group = same.setdefault((group_of[int(number)], hashlib.sha256(encoded).digest()), Equals())
        group.keys.append(row["key"])
        group.labels.add(tuple(row["classes"]))
    return [group for group in same.values() if len(group.keys) > 1]
