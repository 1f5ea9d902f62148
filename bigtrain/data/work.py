"""What a worker of a stream does: a piece's bytes, pictures and views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.decode import Picture, jpeg_decoder
from bigtrain.data.plan import PADDING, Position
from bigtrain.data.reader import Places, Reader
from bigtrain.data.row_cache import RowCache
from bigtrain.data.views import Transform
from bigtrain.images import UnreadableError


@dataclass(frozen=True)
class Piece:
    """A worker's places of one batch, and the samples to read for it, then those of later batches."""

    position: Position
    sample_B: NDArray[np.int64]
    seed_B: NDArray[np.int64]
    read_N: NDArray[np.int64]
    places: Places


@dataclass(frozen=True)
class Done:
    position: Position
    sample_B: NDArray[np.int64]
    seed_B: Tensor
    weight_B: Tensor
    views: dict[str, Tensor]
    bad: dict[int, str]
    read_bytes: int
    failure: OSError | None = None  # a shard that cannot be read, passed on without the worker's traceback
    news: tuple[str, ...] = ()  # of the cache


class Work(torch.utils.data.Dataset[Done]):
    """What a worker does: a piece's bytes, pictures and views."""

    def __init__(self, reader: Reader, transform: Transform, cache: RowCache | None = None) -> None:
        self.reader, self.transform, self.cache, self.decoder = reader, transform, cache, jpeg_decoder()
        self._ahead: dict[int, bytes] = {}  # read and not yet needed
        self._blank = transform.blank()

    def __getitem__(self, piece: Piece) -> Done:
        before = self.reader.bytes_read
        samples = piece.sample_B.tolist()
        weight_B = np.zeros(len(samples), np.float32)
        made = {name: np.empty((len(samples), *view.shape), view.dtype) for name, view in self._blank.items()}
        bad, failure = dict[int, str](), None
        if self.cache is not None:  # of a view that is always the same
            for place, sample in enumerate(samples):
                weight_B[place] = sample != PADDING and self.cache.read(sample, made["image"][place])
        cached = {sample for sample, weight in zip(samples, weight_B, strict=True) if weight}
        for sample in cached:  # read ahead, and then kept by another run
            self._ahead.pop(sample, None)
        try:
            self._read(piece, cached)
        except OSError as error:
            failure = type(error)(str(error))
        for place, (sample, seed) in enumerate(zip(samples, piece.seed_B.tolist(), strict=True)):
            if sample in cached:
                continue
            views = self._blank
            if sample != PADDING and failure is None:
                try:
                    picture = Picture(self._ahead.pop(sample), self.decoder)
                    views = self.transform(picture, np.random.Generator(np.random.Philox(key=seed % 2**64)))
                    weight_B[place] = 1
                except UnreadableError as reason:
                    bad[sample] = str(reason)
            for name, view in views.items():
                made[name][place] = view
            if self.cache is not None and weight_B[place]:
                self.cache.write(sample, made["image"][place])
        return Done(
            position=piece.position,
            sample_B=piece.sample_B,
            seed_B=torch.from_numpy(piece.seed_B),
            weight_B=torch.from_numpy(weight_B),
            views={name: torch.from_numpy(views) for name, views in made.items()},
            bad=bad,
            read_bytes=self.reader.bytes_read - before,
            failure=failure,
            news=tuple(self.cache.news()) if self.cache is not None else (),
        )

    def _read(self, piece: Piece, cached: set[int]) -> None:
        """The bytes of a piece's pictures, but for those in the cache, and of later ones in the same spans."""
        own = set(piece.sample_B.tolist())

        def lacks(sample: int) -> bool:
            if sample in self._ahead or sample in cached:
                return False
            return self.cache is None or sample in own or not self.cache.has(sample)

        lacking = np.array([lacks(sample) for sample in piece.read_N.tolist()], bool)
        if lacking.any():
            payloads = self.reader.read(*piece.places.those(lacking))
            self._ahead |= zip(piece.read_N[lacking].tolist(), payloads, strict=True)


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors concatenated; in pinned memory where there is a GPU, so that copies overlap its work."""
    if len(parts) == 1 and not torch.cuda.is_available():
        return parts[0]
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    whole = parts[0].new_empty(shape, pin_memory=torch.cuda.is_available())
    return torch.cat(parts, out=whole)
