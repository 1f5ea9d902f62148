"""The stream: from a plan to batches, the same at any world size and with any number of workers.

The stages are an explicit `webdataset.DataPipeline` behind a `WebLoader`: positions -> bytes -> views -> batch. A
worker makes whole batches, every W-th one, so workers change neither order nor content. Never pass a stream to
`accelerator.prepare`: it would be read by one rank for all, or sharded a second time.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bigtrain.data.plan import PADDING, Plan, Position, check_divides, sample_seeds
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Transform

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

    def mean(self, value_B: Tensor, world_size: int) -> Tensor:
        """The mean over the step's planned samples on all ranks, once gradients are averaged over the ranks."""
        return (value_B * self.weight_B).sum() * (world_size / self.samples_in_step)

    def pin_memory(self) -> Batch:
        """The loader calls it, so that copies to a GPU run beside its work."""
        return replace(self, views={name: view.pin_memory() for name, view in self.views.items()})

    def to(self, device: torch.device) -> Batch:
        views = {name: view.to(device, non_blocking=True) for name, view in self.views.items()}
        return replace(self, views=views, weight_B=self.weight_B.to(device), seed_B=self.seed_B.to(device))


class Stream:
    """Batches of one rank: `for batch in stream.batches(start, epochs)`.

    Args:
        shard_set: where the pictures are.
        plan: which of them, in what order.
        transform: picture and random generator to named uint8 views, e.g. `views.Resized(224)`.
        rank, world_size: this process among all; the world size must divide the plan's global batch.
        workers: processes that read and decode; 0 does it in this one.
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
    ) -> None:
        check_divides(plan.global_batch, world_size)
        self.shard_set, self.plan, self.transform = shard_set, plan, transform
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.budget = ErrorBudget(shard_set, len(plan.sample_N) // world_size)

    def batches(self, start: Position = START, epochs: int = 1) -> Iterator[Batch]:
        """This rank's batches from `start` to the end of epoch `epochs - 1`; the same from any start."""
        pipeline = wds.DataPipeline(
            _Positions(self.plan, start, epochs),
            self._read,
            self._decode,
        )
        loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context="forkserver" if self.workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            self.budget.count(batch)
            yield batch

    def _read(self, positions: Iterable[Position]) -> Iterator[tuple[Position, NDArray[np.int64], list[bytes]]]:
        for position in positions:
            sample_B = self.plan.slice(position, self.rank, self.world_size)
            yield position, sample_B, self.shard_set.read([int(s) for s in sample_B if s != PADDING])

    def _decode(self, parts: Iterable[tuple[Position, NDArray[np.int64], list[bytes]]]) -> Iterator[Batch]:
        blank = self.transform.blank()
        for position, sample_B, payloads in parts:
            seed_B = sample_seeds(self.plan.seed, position.epoch, sample_B)
            payload = iter(payloads)
            made, weight_B, bad = [], np.zeros(len(sample_B), np.float32), {}
            for place, (sample, seed) in enumerate(zip(sample_B.tolist(), seed_B.tolist(), strict=True)):
                views = blank
                if sample != PADDING:
                    try:
                        image = decode(next(payload))
                    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
                        bad[sample] = f"{type(error).__name__}: {error}"
                    else:
                        views = self.transform(image, np.random.Generator(np.random.Philox(key=seed % 2**64)))
                        weight_B[place] = 1
                made.append(views)
            yield Batch(
                position=position,
                samples_in_step=self.plan.samples_in(position),
                sample_B=sample_B,
                weight_B=torch.from_numpy(weight_B),
                seed_B=torch.from_numpy(seed_B),
                views={name: torch.from_numpy(np.stack([views[name] for views in made])) for name in blank},
                bad=bad,
            )


def decode(payload: bytes) -> Image.Image:
    """The picture in `payload` as RGB of 8 bits; 16-bit greys keep their high byte.

    Anything Pillow warns about in the file is not our log's business.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(payload)) as image:
            if image.mode == "F":
                raise ValueError("a picture of floating-point numbers, which have no given range")
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")


class _Positions(torch.utils.data.IterableDataset[Position]):
    """The source stage: the positions of this worker, every W-th one from its own number on."""

    def __init__(self, plan: Plan, start: Position, epochs: int) -> None:
        self.plan, self.start, self.epochs = plan, start, epochs

    def __iter__(self) -> Iterator[Position]:
        worker = torch.utils.data.get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, position in enumerate(self.plan.positions(self.start, self.epochs)):
            if number % every == first:
                yield position


class ErrorBudget:
    """Names each picture that cannot be decoded, once, and stops the run when there are too many.

    Too many: `in_a_row` one after the other, or more than `share` of the samples that this rank reads in an epoch
    (one is always allowed).
    """

    def __init__(self, shard_set: ShardSet, samples: int, *, in_a_row: int = 100, share: float = 0.01) -> None:
        self.shard_set, self.in_a_row, self.limit = shard_set, in_a_row, max(1, int(share * samples))
        self.skipped: dict[str, str] = {}  # key -> reason
        self._row = 0

    def count(self, batch: Batch) -> None:
        for sample in batch.sample_B.tolist():
            if sample == PADDING:
                continue
            self._row = self._row + 1 if sample in batch.bad else 0
            if sample in batch.bad and (key := self.shard_set.key(sample)) not in self.skipped:
                self.skipped[key] = batch.bad[sample]
                log.warning("skipped %s of %s: %s", key, self.shard_set.url, batch.bad[sample])
            if self._row >= self.in_a_row or len(self.skipped) > self.limit:
                listing = "".join(f"\n  {key}: {reason}" for key, reason in self.skipped.items())
                raise ValueError(
                    f"{self.shard_set.url}: {len(self.skipped)} pictures cannot be decoded, {self._row} of them in a "
                    f"row; at most {self.limit}, and {self.in_a_row - 1} in a row, are skipped. Repair or remove them:"
                    f"{listing}"
                )
