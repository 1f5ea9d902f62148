"""The stream: from a plan to batches, the same at any world size and with any number of workers.

This process plans: it cuts its slice of each step into pieces, one a worker, and tells each worker which bytes to read
(so workers need no index). A worker reads and decodes; the pieces are joined here, in a `webdataset.DataPipeline`
behind a `WebLoader`. A worker has the same places of every batch, so in large sets it reads whole spans (see plan.py).
Never pass a stream to `accelerator.prepare`: it would be read by one rank for all, or sharded a second time.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.ahead import ahead
from bigtrain.data.error_budget import ErrorBudget
from bigtrain.data.memory import has_little_shared_memory, keep_freed_memory
from bigtrain.data.plan import PADDING, Plan, Position, check_divides, sample_seeds
from bigtrain.data.row_cache import RowCache
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Transform
from bigtrain.data.work import Done, Piece, Work, joined
from bigtrain.data.workers import start_worker, worker_context

AHEAD = 2  # batches that are joined, and pinned where there is a GPU, while others are used
log = logging.getLogger(__name__)
START = Position()


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step.

    `weight_B` is 0 in the places of padding and of pictures that could not be decoded, else 1. `samples_in_step`
    counts the planned samples over all ranks, so that a mean can be taken over them wherever they are.
    """

    position: Position
    samples_in_step: int
    sample_B: NDArray[np.int64]
    weight_B: Tensor
    seed_B: Tensor
    views: dict[str, Tensor]
    bad: dict[int, str] = field(default_factory=dict)  # sample -> why it could not be decoded
    read_bytes: int = 0  # for this batch, and ahead of it
    wait_s: float = 0.0  # how long the training waited for it

    @property
    def decoded_B(self) -> NDArray[np.bool_]:
        """Where there is a picture; as `weight_B`, but not on a device."""
        return (self.sample_B != PADDING) & ~np.isin(self.sample_B, list(self.bad))

    def mean(self, value_B: Tensor, world_size: int) -> Tensor:
        """The mean over the step's planned samples on all ranks, once gradients are averaged over the ranks."""
        return (value_B * self.weight_B).sum() * (world_size / self.samples_in_step)

    def part(self, number: int, parts: int) -> Batch:
        """One of so many equal parts, in order; the parts' means add up to the batch's."""
        size = len(self.sample_B) // parts
        places = slice(number * size, (number + 1) * size)
        return replace(
            self,
            sample_B=self.sample_B[places],
            weight_B=self.weight_B[places],
            seed_B=self.seed_B[places],
            views={name: view[places] for name, view in self.views.items()},
        )

    def without_views(self) -> Batch:
        """What is needed to name its pictures."""
        return replace(self, views={})

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)  # a copy that waits would empty the device's queue

        views = {name: moved(view) for name, view in self.views.items()}
        return replace(self, views=views, weight_B=moved(self.weight_B), seed_B=moved(self.seed_B))


class Stream:
    """Batches of one rank: `for batch in stream.batches(start, epochs)`.

    Args:
        shard_set: where the pictures are.
        plan: which of them, in what order.
        transform: picture and random generator to named uint8 views, e.g. `views.Resized(224)`.
        rank, world_size: this process among all; the world size must divide the plan's global batch.
        workers: processes that read and decode; 0 does it in this one. Each has some of the places of every batch, so
            there are never more than this rank has places.
        cache: of the transform's view, where that is always the same (`views.is_fixed`).
        mark: called with what this rank is doing, twice a batch.
        behind_batch: called after each batch.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        plan: Plan,
        transform: Transform,
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        cache: RowCache | None = None,
        mark: Callable[[str], None] = lambda doing: None,
        behind_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.mark, self.behind_batch = mark, behind_batch
        share = plan.global_batch // check_divides(plan.global_batch, world_size)
        self.shard_set, self.plan, self.transform, self.cache = shard_set, plan, transform, cache
        self._news: set[str] = set()  # of the cache
        self.workers = min(workers, share)
        edges = rank * share + np.linspace(0, share, max(self.workers, 1) + 1).astype(int)
        self._lanes = [slice(int(low), int(high)) for low, high in pairwise(edges)]
        self.budget, self._is_alone = ErrorBudget(shard_set, len(plan.sample_N)), world_size == 1

    def batches(self, start: Position = START, epochs: int | None = 1) -> Generator[Batch]:
        """This rank's batches from `start` to the end of epoch `epochs - 1`, or without end; the same from any start.

        Raises:
            ValueError: more pictures cannot be decoded than the error budget allows.
            OSError: a shard cannot be read.
        """
        keep_freed_memory()
        loader = wds.WebLoader(
            Work(self.shard_set.reader(), self.transform, self.cache),
            sampler=self._pieces(start, epochs),
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context=worker_context(__name__) if self.workers else None,
            worker_init_fn=start_worker,
        )
        began = time.perf_counter()
        self.mark(f"began to read {self.shard_set.url}")
        joined_batches = wds.DataPipeline(loader, self._received, self._joined)
        for batch in ahead(joined_batches, AHEAD) if self.workers else joined_batches:
            place = f"batch {batch.position.batch} of epoch {batch.position.epoch}"
            self.mark(f"got {place}")
            batch = replace(batch, wait_s=time.perf_counter() - began)
            self.budget.count(batch.sample_B, batch.bad)
            if self._is_alone:
                self.budget.agree(batch.position.epoch, len(batch.bad))
            yield batch
            self.mark(f"was done with {place}")
            self.behind_batch()
            began = time.perf_counter()

    def from_step(self, step: int, steps: int) -> Generator[Batch]:
        """Batches `step` .. `steps - 1`, counted over all epochs from 0."""
        batches = self.batches(self.plan.position_at(step), -(-steps // self.plan.batches_per_epoch))
        try:
            yield from islice(batches, steps - step)
        finally:
            batches.close()  # ends its workers

    @property
    def seed(self) -> int:
        return self.plan.seed

    @property
    def images_per_step(self) -> int:
        return self.plan.global_batch

    @property
    def skipped(self) -> Counter[str]:
        """How many pictures were skipped on this rank, by kind of reason."""
        return self.budget.by_kind

    def bad(self, batch: Batch) -> list[int]:
        """How many pictures of a batch this rank could not decode."""
        return [len(batch.bad)]

    def agree(self, batch: Batch, bad: Sequence[int]) -> None:
        """Count `bad`, summed over the ranks; a single-rank stream has already done so."""
        self.budget.agree(batch.position.epoch, bad[0])

    def keys(self, batch: Batch) -> list[str]:
        """The keys of this rank's slice of a batch."""
        return [self.shard_set.key(sample) for sample in batch.sample_B.tolist() if sample != PADDING]

    def _pieces(self, start: Position, epochs: int | None) -> Iterator[Piece]:
        """What each worker is to do, one piece after the other; a loader gives them to its workers in turn."""
        for position in self.plan.positions(start, epochs):
            sample_G = self.plan.batch(position)
            for lanes in self._lanes:
                sample_B = sample_G[lanes]
                since = position.batch - (start.batch if position.epoch == start.epoch else 0)
                rest = self.plan.rest_of_spans(position, lanes, since)
                read_N = np.concatenate([sample_B[sample_B != PADDING], rest])
                seed_B = sample_seeds(self.plan.seed, position.epoch, sample_B)
                yield Piece(position, sample_B, seed_B, read_N, self.shard_set.places(read_N))

    def _received(self, loader: Iterable[Done]) -> Iterator[Done]:
        """The workers' results; a killed worker stops the run with a clear error."""
        has_begun = False
        try:
            for part in loader:
                has_begun = True
                yield part
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            is_other = isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)
            if self.workers == 0 or is_other or "Original Traceback" in str(error):
                raise
            why = "was it killed, or out of memory? Use fewer --workers"
            if "shared memory" in str(error):
                why = "there is too little shared memory: make /dev/shm larger (docker run --shm-size)"
            elif has_little_shared_memory():
                why += ", or is there too little shared memory? Make /dev/shm larger (docker run --shm-size)"
            elif not has_begun:
                why += '. Or did it never start? A script must stream inside `if __name__ == "__main__":`'
            raise OSError(f"a process that reads {self.shard_set.url} has ended; {why}.") from error

    def _joined(self, done: Iterable[Done]) -> Iterator[Batch]:
        for parts in zip(*[iter(done)] * len(self._lanes), strict=True):
            for part in parts:
                if part.failure is not None:
                    raise self.shard_set.naming_keys(part.failure, part.sample_B[part.sample_B != PADDING])
            for sentence in {s for part in parts for s in part.news} - self._news:
                self._news.add(sentence)
                log.warning(sentence)
            position = parts[0].position
            yield Batch(
                position=position,
                samples_in_step=self.plan.samples_in(position),
                sample_B=np.concatenate([part.sample_B for part in parts]),
                weight_B=joined([part.weight_B for part in parts]),
                seed_B=joined([part.seed_B for part in parts]),
                views={name: joined([part.views[name] for part in parts]) for name in parts[0].views},
                bad={sample: why for part in parts for sample, why in part.bad.items()},
                read_bytes=sum(part.read_bytes for part in parts),
            )
