"""Several streams side by side: every step has a batch of each, in fixed numbers (known and reference images, say).

Each source has a plan of its own, so its order, views and state do not depend on the others. One that is smaller
begins its next epoch while another is still in its first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence

import torch

from bigtrain.data.stream import Batch, Stream


class Batches(dict[str, Batch]):
    """One batch a source, which go through a step together."""

    @property
    def wait_s(self) -> float:
        return sum(batch.wait_s for batch in self.values())

    @property
    def read_bytes(self) -> int:
        return sum(batch.read_bytes for batch in self.values())

    def part(self, number: int, parts: int) -> Batches:
        return Batches((name, batch.part(number, parts)) for name, batch in self.items())

    def without_views(self) -> Batches:
        return Batches((name, batch.without_views()) for name, batch in self.items())

    def to(self, device: torch.device) -> Batches:
        return Batches((name, batch.to(device)) for name, batch in self.items())


class Mixture:
    """`for batches in mixture.from_step(0, steps)`, each a dict with one batch a source.

    Args:
        streams: by the name of the source; the numbers of samples a step are their plans' global batches.
    """

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        if not streams:
            raise ValueError("a mixture of no streams was asked for: give at least one.")
        self.streams = dict(streams)

    def from_step(self, step: int, steps: int) -> Generator[Batches]:
        """Steps `step` .. `steps - 1`, counted from 0; the same from any start."""
        endless = {name: of.batches(of.plan.position_at(step), epochs=None) for name, of in self.streams.items()}
        try:
            for _ in range(step, steps):
                yield Batches((name, next(batches)) for name, batches in endless.items())
        finally:
            for batches in endless.values():  # ends their workers
                batches.close()

    @property
    def seed(self) -> int:
        return next(iter(self.streams.values())).seed

    @property
    def images_per_step(self) -> int:
        return sum(stream.images_per_step for stream in self.streams.values())

    @property
    def skipped(self) -> Counter[str]:
        return sum((stream.skipped for stream in self.streams.values()), Counter[str]())

    def bad(self, batches: Mapping[str, Batch]) -> list[int]:
        return [len(batch.bad) for batch in batches.values()]

    def agree(self, batches: Mapping[str, Batch], bad: Sequence[int]) -> None:
        for (name, batch), count in zip(batches.items(), bad, strict=True):
            self.streams[name].agree(batch, [count])

    def keys(self, batches: Mapping[str, Batch]) -> list[str]:
        return [key for name, batch in batches.items() for key in self.streams[name].keys(batch)]
