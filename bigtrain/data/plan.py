"""The order of an epoch, as pure integers: who reads which sample when, and which random numbers belong to it.

The order is a function of (seed, epoch, samples, global batch) and of nothing else: ranks and workers only take
slices of it. So a run resumes in the middle of an epoch from two integers, at any world size that divides the global
batch.

A set of a few shards is shuffled whole. In a larger one that would make each picture a separate, distant read.
There the unit is the span, some consecutive samples of one shard: spans are shuffled over the whole set and dealt
to G lanes, and batch b is sample b of every lane. So a batch holds G spans' samples, mixed as widely as the set is, and
whoever serves a lane reads each span at once. Lanes belong to places in the global batch, not to ranks. Successive
batches share spans, which does no harm where neighbours in a shard are unlike; `ShardSet.plan` looks at that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

PADDING = -1
SHUFFLED_WHOLE = 16  # shards at most
MAX_SPAN = 32  # samples


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
        shard_N: the shard of each.
        global_batch: G, samples a step over all processes.
        seed: of the shuffling and of every sample's own random numbers.
        shuffle: False gives index order, for evaluation.
        span_length: samples of a span, at most.
        drop_last: leave out the short last batch of each epoch (other samples each time): its padding would enter a
            batch norm's statistics.
    """

    sample_N: NDArray[np.int64]
    shard_N: NDArray[np.int32]
    global_batch: int
    seed: int = 0
    shuffle: bool = True
    span_length: int = MAX_SPAN
    drop_last: bool = False
    _orders: dict[int, NDArray[np.int32]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.sample_N) == 0:
            raise ValueError("there are no samples to read: the known/novel settings leave none; choose other classes.")
        if self.global_batch < 1:
            raise ValueError(f"a global batch of {self.global_batch} was asked for; use 1 or more.")
        if self.drop_last and len(self.sample_N) < self.global_batch:
            raise ValueError(
                f"there are {len(self.sample_N)} samples and a global batch of {self.global_batch}: with a batch norm "
                f"that is trained, use a batch of {len(self.sample_N)} at most, or --batch-norm frozen."
            )

    @property
    def batches_per_epoch(self) -> int:
        full, rest = divmod(len(self.sample_N), self.global_batch)
        return full + bool(rest and not self.drop_last)

    @cached_property
    def in_spans(self) -> bool:
        """Whether samples are shuffled by spans."""
        return self.shuffle and bool(np.count_nonzero(np.diff(self.shard_N)) >= SHUFFLED_WHOLE)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Every sample exactly once, in the order of this epoch: shape (N,)."""
        return self.sample_N[self._places(epoch)] if self.shuffle else self.sample_N

    def batch(self, position: Position) -> NDArray[np.int64]:
        """The G samples of one step over all ranks; the short last batch of an epoch is filled with PADDING."""
        batch_G = np.full(self.global_batch, PADDING, dtype=np.int64)
        part = self._of_lanes(position)
        batch_G[: len(part)] = self.sample_N[part]
        return batch_G

    def rest_of_spans(self, position: Position, lanes: slice, since: int) -> NDArray[np.int64]:
        """The samples that will follow in these lanes, as far as one read serves them: those of the spans that start at
        this position, and of the spans under way in some of the lanes when reading began.

        Args:
            since: batches read of this epoch since reading began; reading all open spans at once would delay the
                first batch, so lanes take turns.
        """
        if not self.in_spans:
            return np.empty(0, np.int64)
        batches = range(position.batch, min(position.batch + self.span_length, self.batches_per_epoch))
        columns = [self._of_lanes(Position(position.epoch, b))[lanes] for b in batches]
        going = np.arange(len(columns[0])) % self.span_length == since
        if since:
            before = self._of_lanes(Position(position.epoch, position.batch - 1))[lanes][: len(going)]
            going |= ~self._follows(before, columns[0])
        rest = [np.empty(0, np.int32)]
        for now, then in pairwise(columns):
            going = going[: len(then)] & self._follows(now[: len(then)], then)
            rest.append(then[going])
        return self.sample_N[np.concatenate(rest)]

    def _follows(self, now: NDArray[np.int32], then: NDArray[np.int32]) -> NDArray[np.bool_]:
        return (then == now + 1) & (self.shard_N[then] == self.shard_N[now])

    def _of_lanes(self, position: Position) -> NDArray[np.int32]:
        """The places in sample_N of one step's samples, at most G."""
        start = position.batch * self.global_batch
        if not self.shuffle:
            return np.arange(start, min(start + self.global_batch, len(self.sample_N)), dtype=np.int32)
        return self._places(position.epoch)[start : start + self.global_batch]

    def _places(self, epoch: int) -> NDArray[np.int32]:
        if epoch not in self._orders:
            while len(self._orders) > 1:  # where one epoch ends, the next is read ahead
                del self._orders[min(self._orders)]
            self._orders[epoch] = shuffled_places(self, epoch)
        return self._orders[epoch]

    def slice(self, position: Position, rank: int, world_size: int) -> NDArray[np.int64]:
        """Rank r's share of a step: samples [r G/W, (r+1) G/W) of the global batch."""
        share = self.global_batch // check_divides(self.global_batch, world_size)
        return self.batch(position)[rank * share : (rank + 1) * share]

    def samples_in(self, position: Position) -> int:
        """How many samples of a step are real, over all ranks."""
        return min(self.global_batch, len(self.sample_N) - position.batch * self.global_batch)

    def positions(self, start: Position, epochs: int | None) -> Iterator[Position]:
        """Every position from `start` to the end of epoch `epochs - 1`, or without end."""
        for epoch in count(start.epoch) if epochs is None else range(start.epoch, epochs):
            for batch in range(start.batch if epoch == start.epoch else 0, self.batches_per_epoch):
                yield Position(epoch, batch)

    def after(self, position: Position) -> Position:
        last = position.batch + 1 == self.batches_per_epoch
        return Position(position.epoch + 1, 0) if last else Position(position.epoch, position.batch + 1)

    def position_at(self, step: int) -> Position:
        """Where training stands after so many steps."""
        return Position(*divmod(step, self.batches_per_epoch))


def shuffled_places(plan: Plan, epoch: int) -> NDArray[np.int32]:
    """The order of an epoch as places in sample_N."""
    rng = np.random.Generator(np.random.Philox(key=[plan.seed, epoch]))
    place_N = np.arange(len(plan.sample_N), dtype=np.int32)
    start_S = np.flatnonzero(np.diff(plan.shard_N, prepend=-1))
    if not plan.in_spans:
        of_shard = np.split(place_N, start_S[1:])
        return rng.permutation(np.concatenate([of_shard[s] for s in rng.permutation(len(start_S))]))
    size_S = np.diff(start_S, append=len(place_N))
    phase_S = rng.integers(plan.span_length, size=len(start_S))  # each epoch cuts the spans elsewhere
    in_span_N = place_N - np.repeat((start_S - phase_S).astype(np.int32), size_S)
    in_span_N %= plan.span_length
    begins_N = in_span_N == 0
    begins_N[start_S] = True
    start_R = np.flatnonzero(begins_N)
    size_R = np.diff(start_R, append=len(place_N))
    shuffled_R = rng.permutation(len(start_R))
    start_R, size_R = start_R[shuffled_R], size_R[shuffled_R]
    # spans in their new order: each place is its own number plus its span's shift
    tape_N = place_N + np.repeat((start_R - np.concatenate([[0], np.cumsum(size_R)[:-1]])).astype(np.int32), size_R)
    return dealt(tape_N, plan.global_batch)


def dealt(tape_N: NDArray[np.int32], lanes: int) -> NDArray[np.int32]:
    """Cut a sequence into consecutive parts, one a lane, and take one of each in turn: [0..5] on 4: [0 2 4 5 1 3]."""
    rows, rest = divmod(len(tape_N), lanes)
    longer = tape_N[: rest * (rows + 1)].reshape(rest, rows + 1)
    shorter = tape_N[rest * (rows + 1) :].reshape(lanes - rest, rows)
    return np.concatenate([np.concatenate([longer[:, :rows], shorter]).T.ravel(), longer[:, rows:].T.ravel()])


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
