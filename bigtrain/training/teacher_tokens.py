"""The teacher's tokens of the training pictures, computed in the first epoch and kept: nothing is augmented."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
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
from bigtrain.runtime.exit import at_end
from bigtrain.runtime.launch import cores
from bigtrain.training.caches import data_of, decoder, folder_of, prepared
from bigtrain.training.compiling import compile_pays, prepare_compiling
from bigtrain.training.feature_cache import fingerprint
from bigtrain.training.run_setup import Setup
from bigtrain.training.token_rows import Kept, TokenRows

MOST_THREADS = 8


class Computed(NamedTuple):
    """Rows on their way from the device to the cache."""

    sample_B: NDArray[np.int64]
    rows: Arriving


class TeacherTokens:
    """The teacher's tokens of any training batch: read, where all of its pictures were seen before, else computed, and
    kept for later epochs.

    Where they are kept, tokens that are just computed are rounded as they would be read, so that a run gets the same
    tokens however much room there is. On a GPU the rows are copied beside its work and written some steps later. There
    they are kept only where --cache-dir names a disk: to read them takes 300 kB an image, and a slow disk costs more
    than computing. Threads read and write: most of it is time without Python's lock.

    Args:
        plan: of the distillation.
        steps: of the distillation; within one epoch no picture comes twice, and nothing is kept.
        layers: so many of the teacher's last blocks.
        with_attention: the attention of the teacher's guide too.
        is_tuned: this run has tuned the teacher; no other one has any use for its tokens.
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
        is_tuned: bool,
    ) -> None:
        self.setup, self.teacher, self.layers, self.with_attention = setup, teacher, layers, with_attention
        self.image_size, self.is_tuned = image_size, is_tuned
        self.cache: RowCache | None = None
        self.rows: TokenRows | None = None
        self._threads = ThreadPoolExecutor(max(1, min(MOST_THREADS, cores() - 1)))
        self._under_way: deque[Computed] = deque()
        self._encode: Any = teacher.vit
        if compile_pays(setup.settings.compile, setup.accelerator.device, steps):
            prepare_compiling(setup.settings.compile)
            self._encode = torch.compile(teacher.vit, dynamic=False)  # not in place: it is judged as it is
        settings, on_gpu = setup.settings, setup.accelerator.device.type == "cuda"
        if steps <= plan.batches_per_epoch or not settings.cache_gib or (on_gpu and not settings.cache_dir):
            return
        kept: Kept = "bf16" if setup.precision == "bf16" else "fp32"
        if settings.cache_dtype != "auto":
            kept = settings.cache_dtype
        patches = (image_size // teacher.vit.patch_size) ** 2
        self.rows = TokenRows(kept, layers, patches, teacher.vit.width, with_attention)
        cache = RowCache(
            folder_of(setup), "tokens",
            {
                "teacher": fingerprint(teacher), "data set": data_of(shard_set), "view": [image_size, decoder()],
                "precision": setup.precision, "device": setup.accelerator.device.type, "blocks": layers,
                "attention": [with_attention, teacher.vit.attention_backend], "dtype": kept,
            },
            rows=len(shard_set), row_bytes=self.rows.row_bytes,
        )  # fmt: skip
        images = len(plan.sample_N)
        self.cache = prepared(setup, cache, images, f"the teacher's tokens of {images} images in {kept}")
        at_end.callback(self.flush)

    @property
    def flops_per_image(self) -> int:
        """Of a training step: the teacher's forward pass, unless its tokens are read, as they are from the second epoch
        on."""
        return vit_forward_flops(self.teacher.vit, self.image_size) if self.cache is None else 0

    def of(self, batch: Batch, image_B3HW: Tensor) -> Encoded:
        """The tokens of a batch, whose normalised pictures are given in case they must be computed."""
        if self.rows is None:
            return self._computed(image_B3HW)
        sample_B = np.where(batch.decoded_B, batch.sample_B, PADDING)
        if (row_B := self._read(sample_B)) is None:
            row_B = self.rows.pack(self._computed(image_B3HW))
            self._keep(sample_B, row_B)
        return self.rows.unpack(row_B.to(image_B3HW.device, non_blocking=True))

    def flush(self) -> None:
        """Write what is under way."""
        self._write(0)

    def remove(self) -> None:
        """Once the student is done: delete tokens that no other run can use. Called on all ranks."""
        self.flush()
        self.setup.accelerator.wait_for_everyone()
        if self.cache is not None and self.is_tuned and self.setup.accelerator.is_local_main_process:
            self.cache.remove()

    @torch.no_grad()
    def _computed(self, image_B3HW: Tensor) -> Encoded:
        (seen,) = self._encode(image_B3HW, last=self.layers, with_attention=self.with_attention)
        return seen

    def _read(self, sample_B: NDArray[np.int64]) -> Tensor | None:
        """The rows of a batch; None if any is lacking."""
        if self.cache is None:
            return None
        samples = set(sample_B.tolist()) - {PADDING}
        if any(samples.intersection(computed.sample_B.tolist()) for computed in self._under_way):
            self.flush()
        if not all(map(self.cache.has, samples)):
            return None
        on_gpu = self.setup.accelerator.device.type == "cuda"
        row_B = torch.zeros(len(sample_B), self.cache.row_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        places = np.flatnonzero(sample_B != PADDING)
        into_B = row_B.numpy()
        are_whole = self._threads.map(self.cache.read, sample_B[places].tolist(), (into_B[place] for place in places))
        return row_B if all(list(are_whole)) else None

    def _keep(self, sample_B: NDArray[np.int64], row_B: Tensor) -> None:
        if self.cache is None or self.cache.is_full:
            return
        self._under_way.append(Computed(sample_B, Arriving({"row_B": row_B})))
        self._write(STEPS if row_B.is_cuda else 0)

    def _write(self, behind: int) -> None:
        """Write the rows that have come, but for the newest `behind` batches."""
        if self.cache is None:
            return
        while len(self._under_way) > behind:
            sample_B, rows = self._under_way.popleft()
            row_B, places = rows.read()["row_B"].numpy(), np.flatnonzero(sample_B != PADDING)
            list(self._threads.map(self.cache.write, sample_B[places].tolist(), (row_B[place] for place in places)))
        for sentence in self.cache.news():
            self.setup.accelerator.print(f"note: {sentence}")
