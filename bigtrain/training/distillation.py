"""What recipes/distil.py learns from: a teacher's targets, standardised over the data, computed or cached."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch, Stream
from bigtrain.data.views import Resized
from bigtrain.models.dense_features import dense_features, dense_grid, on_grid
from bigtrain.models.network import Network
from bigtrain.models.read_weights import read_tensors
from bigtrain.models.weights import save_tensors
from bigtrain.objectives.feature_matching import Standardised
from bigtrain.training.feature_cache import Features, Source, extracted, fingerprint
from bigtrain.training.run_setup import Setup

GIB = 2**30
FOLDER = "targets"  # in the run folder


class Targets:
    """One teacher's standardised targets on the student's grid.

    Args:
        teacher: on the device, frozen.
        size: side of the pictures that it sees.
        grid: of the student's patches.
        batch: images of a forward pass, when computed in advance.
    """

    def __init__(self, setup: Setup, teacher: Network, size: int, grid: tuple[int, int], batch: int) -> None:
        self.setup, self.teacher, self.size, self.grid, self.batch = setup, teacher, size, grid, batch
        self.cached: Features | None = None
        _, self.widths = dense_grid(teacher.to("cpu").trunk, size)
        teacher.to(setup.accelerator.device)
        self.patches: nn.Module = nn.Identity()
        self.pooled: nn.Module = nn.Identity()

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The targets of a batch: (B, N, D) and (B, D)."""
        if self.cached is not None:
            real_B, device = batch.decoded_B, self.setup.accelerator.device
            found_N, row_NF = self.cached.of(batch.sample_B[real_B])
            if len(found_N) == real_B.sum():  # else a picture that failed before was decoded now
                row_BF = torch.zeros(len(real_B), row_NF.shape[1])
                row_BF[torch.from_numpy(real_B)] = torch.from_numpy(row_NF)
                row_BF = (row_BF.pin_memory() if device.type == "cuda" else row_BF).to(device, non_blocking=True)
                patches_BF, pooled_BD = row_BF[:, : -self.widths[1]], row_BF[:, -self.widths[1] :]
                return self.patches(patches_BF.unflatten(1, (-1, self.widths[0]))), self.pooled(pooled_BD)
        patches_BND, pooled_BD = self._raw(batch.views["image"])
        return self.patches(patches_BND), self.pooled(pooled_BD)

    def standardise(self, shard_set: ShardSet, sample_N: NDArray[np.int64], image_size: int, file: Path) -> None:
        """Measure mean and covariance of the targets over some pictures, or read what an earlier start has measured.

        Weak eigenvectors turn with the last bit, and what a student learns must be the same on all ranks, at any world
        size and after a restart: each rank looks at all of the pictures in the same batches, and the first one's
        figures count.
        """
        if not file.is_file():
            plan = shard_set.plan(sample_N, self.batch, shuffle=False)
            stream = Stream(
                shard_set, plan, Resized(image_size), rank=0, world_size=1, workers=self.setup.workers,
                mark=self.setup.heartbeat.mark, behind_batch=self.setup.stop.leave_if_asked,
            )  # fmt: skip
            measured = self._measured(stream)
            if self.setup.accelerator.is_main_process:
                save_tensors(file, measured, {})
        self.setup.accelerator.wait_for_everyone()
        tensors, _ = read_tensors(file)
        for name in ("patches", "pooled"):
            standardised = Standardised(tensors[f"{name}.mean_D"], tensors[f"{name}.covariance_DD"])
            setattr(self, name, standardised.to(self.setup.accelerator.device))

    def cache(self, shard_set: ShardSet, sample_N: NDArray[np.int64], image_size: int) -> None:
        """Compute the targets of whole pictures once, and keep them in the run folder and in memory.

        Raises:
            ValueError: they would not fit.
        """
        identity = {
            "network": fingerprint(self.teacher), "size": self.size, "grid": list(self.grid), "view": image_size,
            "precision": self.setup.precision,
        }  # fmt: skip
        limit = self.setup.settings.cache_gib
        needed = 4 * len(sample_N) * (self.widths[0] * self.grid[0] * self.grid[1] + self.widths[1]) / GIB
        if needed > limit:
            raise ValueError(
                f"the targets of one teacher for {len(sample_N)} images need {needed:.1f} GiB, and --cache-gib is "
                f"{limit:g}: raise it, lower --train-limit, or leave --cache-targets out."
            )
        source = Source(self._row, Resized(image_size), self.batch, identity, 16 * self.batch, "the teacher's targets")
        self.cached = extracted(self.setup.run / FOLDER, self.setup, source, shard_set, sample_N)

    @torch.no_grad()
    def _raw(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) and (B, D) of uint8 pictures, as the teacher gives them, float32."""
        if image_B3HW.shape[-1] != self.size:
            size = (self.size, self.size)
            resized = F.interpolate(image_B3HW.float(), size, mode="bicubic", antialias=True)
            image_B3HW = resized.round().clamp(0, 255).byte()
        with self.setup.autocast():
            map_BDhw, pooled_BD = dense_features(self.teacher.trunk, self.teacher.normalise(image_B3HW))
        return on_grid(map_BDhw.float(), self.grid).flatten(2).transpose(1, 2), pooled_BD.float()

    def _row(self, image_B3HW: Tensor) -> Tensor:
        patches_BND, pooled_BD = self._raw(image_B3HW)
        return torch.cat([patches_BND.flatten(1), pooled_BD], dim=1)

    def _measured(self, stream: Stream) -> dict[str, Tensor]:
        """Mean and covariance of the patches and of the pooled features of a stream's pictures, float64."""
        count: dict[str, int] = Counter()
        sums: dict[str, Tensor] = {}
        for batch in stream.batches():
            batch = batch.to(self.setup.accelerator.device)
            patches_BND, pooled_BD = self._raw(batch.views["image"])
            real_B = batch.weight_B > 0
            for name, rows_TD in (("patches", patches_BND[real_B].flatten(0, 1)), ("pooled", pooled_BD[real_B])):
                rows_TD = rows_TD.double()
                count[name] += len(rows_TD)
                for part, of_batch in (("sum_D", rows_TD.sum(dim=0)), ("sum_DD", rows_TD.T @ rows_TD)):
                    key = f"{name}.{part}"
                    sums[key] = sums[key] + of_batch if key in sums else of_batch
            stream.mark(f"measured targets of batch {batch.position.batch}")
        measured: dict[str, Tensor] = {}
        for name in count:
            mean_D = sums[f"{name}.sum_D"] / count[name]
            covariance_DD = sums[f"{name}.sum_DD"] / count[name] - mean_D[:, None] * mean_D
            measured |= {f"{name}.mean_D": mean_D.cpu(), f"{name}.covariance_DD": covariance_DD.cpu()}
        return measured


def remove_targets(setup: Setup) -> None:
    """Delete the run folder's copies, once the student is done."""
    if setup.accelerator.is_main_process:
        shutil.rmtree(setup.run / FOLDER, ignore_errors=True)


class Student(nn.Module):
    """A network and its heads, one for the patches and one for the pooled features of each teacher; they are thrown
    away.

    Args:
        widths: of the trunk's own map and pooled features.
        targets: what it learns.
    """

    def __init__(self, trunk: nn.Module, widths: tuple[int, int], targets: Sequence[Targets]) -> None:
        super().__init__()
        self.trunk = trunk
        self.patch_heads = nn.ModuleList(nn.Linear(widths[0], each.widths[0]) for each in targets)
        self.pooled_heads = nn.ModuleList(nn.Linear(widths[1], each.widths[1]) for each in targets)

    def forward(self, image_B3HW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, N, D) and (B, D) for each teacher, of normalised pictures."""
        map_BDhw, pooled_BD = dense_features(self.trunk, image_B3HW)
        patches_BND = map_BDhw.flatten(2).transpose(1, 2)
        heads = zip(self.patch_heads, self.pooled_heads, strict=True)
        return [(patches(patches_BND), pooled(pooled_BD)) for patches, pooled in heads]
