"""The teacher's tokens of the training pictures, computed in the first epoch and kept: nothing is augmented."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.later import STEPS, Arriving
from bigtrain.data.plan import PADDING, Plan
from bigtrain.data.row_cache import RowCache
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch
from bigtrain.models.flops import vit_forward_flops
from bigtrain.models.network import Network
from bigtrain.models.vit import Encoded
from bigtrain.training.caches import data_of, decoder, folder_of, prepared
from bigtrain.training.compiling import compile_pays, prepare_compiling
from bigtrain.training.feature_cache import fingerprint
from bigtrain.training.run_setup import Setup
from bigtrain.training.token_rows import TokenRows


class Computed(NamedTuple):
    """Rows on their way from the device to the cache."""

    sample_B: NDArray[np.int64]
    rows: Arriving


class TeacherTokens:
    """The teacher's tokens of any training batch: read, where all of its pictures were seen before, else computed, and
    kept for later epochs.

    Tokens that are just computed are rounded as they would be read, so that a run gets the same tokens however much of
    the cache there is. On a GPU the rows are copied beside its work and written some steps later. There they are kept
    only where --cache-dir names a disk: to read them takes 300 kB an image, and a slow disk costs more than computing.

    Args:
        plan: of the distillation.
        steps: of the distillation; within one epoch no picture comes twice, and nothing is kept.
        layers: so many of the teacher's last blocks.
        with_attention: the attention of the teacher's guide too.
    """

    def __init__(
        self,
        setup: Setup,
        teacher: Network,
        shard_set: ShardSet,
        plan: Plan,
        *,
        steps: int,
        image_size: int,
        layers: int,
        with_attention: bool,
    ) -> None:
        self.setup, self.teacher, self.layers, self.with_attention = setup, teacher, layers, with_attention
        self.image_size = image_size
        self.cache: RowCache | None = None
        self._under_way: deque[Computed] = deque()
        self._encode: Any = teacher.vit
        if compile_pays(setup.settings.compile, setup.accelerator.device, steps):
            prepare_compiling(setup.settings.compile)
            self._encode = torch.compile(teacher.vit, dynamic=False)  # not in place: it is judged as it is
        settings, on_gpu = setup.settings, setup.accelerator.device.type == "cuda"
        if steps <= plan.batches_per_epoch or not settings.cache_gib or (on_gpu and not settings.cache_dir):
            return
        kept = (
            ("fp32" if setup.precision == "fp32" else "bf16")
            if settings.cache_dtype == "auto"
            else settings.cache_dtype
        )
        patches = (image_size // teacher.vit.patch_size) ** 2
        self.rows = TokenRows(kept, layers, patches, teacher.vit.width, with_attention)
        cache = RowCache(
            folder_of(setup), "tokens",
            {
                "teacher": fingerprint(teacher), "data set": data_of(shard_set), "view": [image_size, decoder()],
                "precision": setup.precision, "device": setup.accelerator.device.type, "blocks": layers,
                "attention": with_attention, "dtype": kept,
            },
            rows=len(shard_set), row_bytes=self.rows.row_bytes,
        )  # fmt: skip
        images = len(plan.sample_N)
        self.cache = prepared(setup, cache, images, f"the teacher's tokens of {images} images in {kept}")

    @property
    def flops_per_image(self) -> int:
        """Of a training step: the teacher's forward pass, unless its tokens are read."""
        return vit_forward_flops(self.teacher.vit, self.image_size) if self.cache is None else 0

    def of(self, batch: Batch, image_B3HW: Tensor) -> Encoded:
        """The tokens of a batch, whose normalised pictures are given in case they must be computed."""
        if self.cache is None:
            return self._computed(image_B3HW)
        self._write(STEPS if image_B3HW.is_cuda else 0)
        sample_B = np.where(np.isin(batch.sample_B, list(batch.bad)), PADDING, batch.sample_B)
        if (row_B := self._read(sample_B)) is None:
            row_B = self.rows.pack(self._computed(image_B3HW))
            self._keep(sample_B, row_B)
        return self.rows.unpack(row_B.to(image_B3HW.device, non_blocking=True))

    @torch.no_grad()
    def _computed(self, image_B3HW: Tensor) -> Encoded:
        (seen,) = self._encode(image_B3HW, last=self.layers, with_attention=self.with_attention)
        return seen

    def _read(self, sample_B: NDArray[np.int64]) -> Tensor | None:
        """The rows of a batch; None if any is lacking. Rows that are under way are waited for, so that what is read
        does not depend on time."""
        assert self.cache is not None
        samples = set(sample_B.tolist()) - {PADDING}
        if any(samples.intersection(computed.sample_B.tolist()) for computed in self._under_way):
            self._write(0)
        on_gpu = self.setup.accelerator.device.type == "cuda"
        row_B = torch.empty(len(sample_B), self.rows.row_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        into_B = row_B.numpy()
        for place, sample in enumerate(sample_B.tolist()):
            if sample == PADDING:
                into_B[place] = 0
            elif not self.cache.read(sample, into_B[place]):
                return None
        return row_B

    def _keep(self, sample_B: NDArray[np.int64], row_B: Tensor) -> None:
        self._under_way.append(Computed(sample_B, Arriving({"row_B": row_B})))
        if not row_B.is_cuda:
            self._write(0)

    def _write(self, behind: int) -> None:
        """Write the rows that have come, but for the newest `behind` batches."""
        assert self.cache is not None
        while len(self._under_way) > behind:
            sample_B, rows = self._under_way.popleft()
            for sample, row in zip(sample_B.tolist(), rows.read()["row_B"].numpy(), strict=True):
                if sample != PADDING:
                    self.cache.write(sample, row)
        for sentence in self.cache.news():
            self.setup.accelerator.print(f"note: {sentence}")
