"""From settings to the images of a training without labels: which are learnt from, which are looked at."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.protocol import in_validation, seeded_choice
from bigtrain.data.shard_set import ShardSet

FEWEST, ENOUGH = 8, 32  # held-out images: fewer say nothing; of small sets a greater share is held out


class Unlabelled(NamedTuple):
    """The images to learn from, and held-out ones to look at. Labels, where there are any, are for looking only."""

    train: ShardSet
    fitted_N: NDArray[np.int64]
    held_out_N: NDArray[np.int64]

    def __str__(self) -> str:
        return f"{len(self.fitted_N)} images of {self.train.manifest.dataset}, {len(self.held_out_N)} held out"


def read_unlabelled(config: Any) -> Unlabelled:
    """Open the shard set that a recipe's settings name, and divide its images.

    Args:
        config: with train, train_limit, validation_share, guard_images and seed.

    Raises:
        ValueError: too few images to learn from and to look at.
    """
    train = ShardSet(config.train)
    every_N = np.arange(len(train))
    few = max(1, len(train))
    share = max(config.validation_share, min(0.25, ENOUGH / few), min(0.5, FEWEST / few))
    is_held_out = in_validation(train.keys(), train.first_class(train.classes), share=share, seed=config.seed)
    fitted_N = seeded_choice(every_N[~is_held_out], config.train_limit, config.seed)
    held_out_N = seeded_choice(every_N[is_held_out], config.guard_images, config.seed)
    if len(held_out_N) < FEWEST or not len(fitted_N):
        raise ValueError(
            f"{config.train} has {len(train)} images, and {FEWEST} must be held out to look at what training does: "
            f"give at least {2 * FEWEST}, or a greater --validation-share."
        )
    return Unlabelled(train, fitted_N, held_out_N)
