"""The order of an epoch, as pure integers: who reads which sample when, and which random numbers belong to it.

The order is a function of (seed, epoch, samples, global batch) and of nothing else: ranks and workers only take
slices of it. So a run resumes in the middle of an epoch from two integers, at any world size that divides the global
batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PADDING = -1


@dataclass(frozen=True, order=True)
class Position:
    """A place in training: the next batch to be read is batch `batch` of epoch `epoch`."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """The batches of every epoch over some samples of a shard set.

    Args:
        sample_N: the samples to read (rows of the index), ascending; a known/novel filter has been applied.
        shard_N: the shard of each, so that shuffling can keep reads near each other.
        global_batch: G, samples a step over all processes.
        seed: of the shuffling and of every sample's own random numbers.
        shuffle: False gives index order, for evaluation.
        shards_per_block: samples are mixed within blocks of so many shards; blocks and shards are in random order.
    """

    sample_N: NDArray[np.int64]
    shard_N: NDArray[np.int32]
    global_batch: int
    seed: int = 0
    shuffle: bool = True
    shards_per_block: int = 16

    def __post_init__(self) -> None:
        if len(self.sample_N) == 0:
            raise ValueError("there are no samples to read: the known/novel settings leave none; choose other classes.")
        if self.global_batch < 1:
            raise ValueError(f"a global batch of {self.global_batch} was asked for; use 1 or more.")

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.sample_N) // self.global_batch)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Every sample exactly once, in the order of this epoch: shape (N,)."""
        return _order(self, epoch) if self.shuffle else self.sample_N

    def batch(self, position: Position) -> NDArray[np.int64]:
        """The G samples of one step over all ranks; the short last batch of an epoch is filled with PADDING."""
        start = position.batch * self.global_batch
        batch_G = np.full(self.global_batch, PADDING, dtype=np.int64)
        part = self.order(position.epoch)[start : start + self.global_batch]
        batch_G[: len(part)] = part
        return batch_G

    def slice(self, position: Position, rank: int, world_size: int) -> NDArray[np.int64]:
        """Rank r's share of a step: samples [r G/W, (r+1) G/W) of the global batch."""
        share = self.global_batch // check_divides(self.global_batch, world_size)
        return self.batch(position)[rank * share : (rank + 1) * share]

    def samples_in(self, position: Position) -> int:
        """How many samples of a step are real, over all ranks."""
        return min(self.global_batch, len(self.sample_N) - position.batch * self.global_batch)

    def positions(self, start: Position, epochs: int) -> Iterator[Position]:
        """Every position from `start` to the end of the last epoch."""
        for epoch in range(start.epoch, epochs):
            for batch in range(start.batch if epoch == start.epoch else 0, self.batches_per_epoch):
                yield Position(epoch, batch)

    def after(self, position: Position) -> Position:
        last = position.batch + 1 == self.batches_per_epoch
        return Position(position.epoch + 1, 0) if last else Position(position.epoch, position.batch + 1)

    def steps_before(self, position: Position) -> int:
        return position.epoch * self.batches_per_epoch + position.batch


@lru_cache(maxsize=4)  # a few streams read at once; batches of one epoch come in a row
def _order(plan: Plan, epoch: int) -> NDArray[np.int64]:
    rng = np.random.Generator(np.random.Philox(key=[plan.seed, epoch]))
    shards, start_S = np.unique(plan.shard_N, return_index=True)
    sample_of_shard = np.split(plan.sample_N, start_S[1:])
    shuffled = rng.permutation(len(shards))
    blocks = []
    for first in range(0, len(shuffled), plan.shards_per_block):
        block = np.concatenate([sample_of_shard[s] for s in shuffled[first : first + plan.shards_per_block]])
        blocks.append(rng.permutation(block))
    return np.concatenate(blocks)


def check_divides(global_batch: int, world_size: int) -> int:
    """Return the world size, or say which global batches it could share evenly."""
    if global_batch < 1:
        raise ValueError(f"a global batch of {global_batch} was asked for; use 1 or more.")
    if global_batch % world_size:
        lower = global_batch // world_size * world_size
        choice = f"{lower} or {lower + world_size}" if lower else f"{world_size}"
        raise ValueError(
            f"global batch {global_batch} does not divide among {world_size} processes: each would get "
            f"{global_batch / world_size:.2f} images. Use {choice}, or another number of processes."
        )
    return world_size


def sample_seeds(seed: int, epoch: int, sample_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """A seed for each sample's own random numbers, from (seed, epoch, sample) alone."""
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.asarray(seed).astype(np.uint64)) + np.asarray(epoch).astype(np.uint64))
        return _mix(key + sample_B.astype(np.uint64)).astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): near inputs give unrelated outputs."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
