"""Class names as numbers, for methods that tell classes apart: each image must show exactly one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.shard_set import ShardSet


def labels_of(classes: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def only_label(shard_set: ShardSet, sample: int, label_of: dict[str, int]) -> int:
    """The number of the one class among `label_of` that an image shows."""
    labels = [label_of[name] for name in shard_set.classes_of(sample) if name in label_of]
    if len(labels) != 1:
        raise ValueError(
            f"{shard_set.url}: image {shard_set.key(sample)} shows {len(labels)} of the classes to tell apart "
            f"({', '.join(shard_set.classes_of(sample))}); a classifier needs exactly one: use single objects."
        )
    return labels[0]


def check_single_labels(shard_set: ShardSet, sample_N: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Refuse images that show none or several of the classes, before anything is trained."""
    label_of = labels_of(classes)
    for sample in sample_N.tolist():
        only_label(shard_set, sample, label_of)
