"""The samples of an adapter, each with a key of its own, in the adapter's order or shuffled."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from bigtrain.data.schema import Sample
from bigtrain.text import class_name
from shards.index_file import hash64
from shards.keys import safe_key

Samples = Callable[[], Iterator[Sample]]  # starts over at each call


def keyed(samples: Samples) -> Iterator[Sample]:
    """Samples with safe keys, no key twice.

    A hash of each key is kept, in about 85 bytes; where two are equal, the samples are listed again to tell equal keys
    from a collision.
    """
    seen: set[int] = set()
    for sample in with_safe_keys(samples()):
        hashed = hash64(sample.key)
        if hashed in seen:
            check_unique(sample, samples)
        seen.add(hashed)
        yield sample


def with_safe_keys(samples: Iterator[Sample]) -> Iterator[Sample]:
    for sample in samples:
        source = sample.source.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # a name may be no UTF-8
        objects = [replace(thing, class_name=class_name(thing.class_name)) for thing in sample.objects]
        yield replace(sample, key=safe_key(sample.key), source=source, objects=objects)


def check_unique(sample: Sample, samples: Samples) -> None:
    same = [other.source or other.key for other in with_safe_keys(samples()) if other.key == sample.key]
    if len(same) > 1:
        raise ValueError(
            f"{same[0]} and {same[1]} have the same key {sample.key!r}: keys are names without extension, so rename "
            "one of the two, or take one away, and run again; the build continues."
        )


def shuffled(samples: Iterator[Sample], seed: int, folder: Path | None) -> Iterator[Sample]:
    """The samples by the hash of seed and key, so that their order follows from these alone.

    They wait in a nameless temporary file (in `folder`, if given); in memory are 24 bytes of each.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        begins, hashes = array("q"), array("Q")
        for sample in samples:
            begins.append(file.tell())
            hashes.append(hash64(sample.key, str(seed)))
            pickle.dump(sample, file, pickle.HIGHEST_PROTOCOL)
        for place in np.argsort(np.frombuffer(hashes, np.uint64), kind="stable"):
            file.seek(begins[place])
            yield pickle.load(file)  # written above, by this process
