"""From settings to the images of a classifier's training: which are learnt from, which are held out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.protocol import Protocol, check_single_labels, in_validation
from bigtrain.data.shard_set import ShardSet


class Labelled(NamedTuple):
    """The classes to learn, the images to learn them from, and those to report top-1 and top-5 on."""

    classes: tuple[str, ...]
    train: ShardSet
    fitted_N: NDArray[np.int64]
    held_out: ShardSet
    held_out_N: NDArray[np.int64]


def read_labelled(config: Any) -> Labelled:
    """Open the shard sets that a recipe's settings name, train and val, and choose their images.

    Args:
        config: with train, val, validation_share, known, novel and seed.

    Raises:
        ValueError: unknown classes, nothing held out, or an image that shows none or several of the classes.
    """
    train = ShardSet(config.train)
    classes, fitted_N = train.classes, np.arange(len(train))
    if config.known or config.novel:
        protocol = Protocol.of(train.classes, known=config.known, novel=config.novel)
        classes, fitted_N = protocol.known, np.flatnonzero(protocol.is_known(train))
    held_out, held_out_N = train, fitted_N
    if config.val:
        held_out = ShardSet(config.val)
        if unknown := sorted(set(held_out.classes) - set(train.classes)):
            raise ValueError(f"--val has classes that --train lacks: {', '.join(unknown[:10])}.")
        held_out_N = np.flatnonzero(held_out.shows_any(classes))
    else:
        keys = [train.key(sample) for sample in fitted_N.tolist()]
        class_N = train.first_class(classes)[fitted_N]
        is_held_out = in_validation(keys, class_N, share=config.validation_share, seed=config.seed)
        fitted_N, held_out_N = fitted_N[~is_held_out], fitted_N[is_held_out]
    if len(held_out_N) == 0:
        raise ValueError("nothing is held out to report top-1 on: give --val SHARDS, or a greater --validation-share.")
    for shard_set, sample_N in ((train, fitted_N), (held_out, held_out_N)):
        check_single_labels(shard_set, sample_N, classes)
    return Labelled(classes, train, fitted_N, held_out, held_out_N)
