"""The teacher's tokens of the training pictures, computed once on CPUs: distillation does not augment pictures."""

from __future__ import annotations

import errno
import shutil

import torch
from torch import Tensor

from bigtrain.data.plan import Plan
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch
from bigtrain.data.views import Resized
from bigtrain.models.flops import vit_forward_flops
from bigtrain.models.network import Network
from bigtrain.models.vit import Encoded
from bigtrain.training.feature_cache import Features, Source, extracted, fingerprint
from bigtrain.training.run_setup import Setup

GIB = 2**30
FOLDER = "teacher_tokens"  # in the run folder


class TeacherTokens:
    """The teacher's tokens of any training batch, from memory if they fit there, else computed each time.

    Kept in the run folder until the student is done, so that a restart trains on the same bits. On a GPU they are
    always computed.

    Args:
        plan: of the distillation.
        steps: of the distillation; within one epoch no picture comes twice, and nothing is kept.
        layers: so many of the teacher's last blocks.
        with_attention: the attention of [CLS] too.
        batch: images per forward pass, when computed in advance.
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
        batch: int,
    ) -> None:
        self.setup, self.teacher, self.layers, self.with_attention = setup, teacher, layers, with_attention
        self.image_size = image_size
        self.features: Features | None = None
        if setup.accelerator.device.type != "cpu" or steps <= plan.batches_per_epoch or not setup.settings.cache_gib:
            return
        patches, width = (image_size // teacher.vit.patch_size) ** 2, teacher.vit.width
        needed = 4 * len(plan.sample_N) * patches * (layers * width + with_attention)
        if needed > setup.settings.cache_gib * GIB:
            setup.accelerator.print(
                f"distil: the teacher's tokens of {len(plan.sample_N)} images need {needed / GIB:.1f} GiB, more than "
                f"--cache-gib {setup.settings.cache_gib:g}: they are computed in each step."
            )
            return
        identity = {
            "network": fingerprint(teacher),
            "layers": layers,
            "with_attention": with_attention,
            "view": image_size,
            "precision": setup.precision,
            "batch": batch,
        }
        source = Source(self._row, Resized(image_size), batch, identity, part=4 * batch, name="the teacher's tokens")
        try:
            self.features = extracted(setup.run / FOLDER, setup, source, shard_set, plan.sample_N)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"there is no room in {setup.run / FOLDER} for the teacher's tokens ({needed / GIB:.1f} GiB): free "
                "some, or have them computed in each step by --cache-gib 0."
            ) from error

    @property
    def flops_per_image(self) -> int:
        """Of a training step: the teacher's forward pass, unless its tokens are read."""
        return vit_forward_flops(self.teacher.vit, self.image_size) if self.features is None else 0

    def of(self, batch: Batch, image_B3HW: Tensor) -> Encoded:
        """The tokens of a batch, whose normalised pictures are given in case they must be computed."""
        if self.features is not None:
            real_B = (batch.weight_B > 0).numpy()
            found_N, row_NF = self.features.of(batch.sample_B[real_B])
            if len(found_N) == real_B.sum():  # else a picture that failed before was decoded now
                row_BF = torch.zeros(len(real_B), row_NF.shape[1])
                row_BF[torch.from_numpy(real_B)] = torch.from_numpy(row_NF)
                return self._encoded(row_BF)
        with torch.no_grad():
            (seen,) = self.teacher.vit(image_B3HW, last=self.layers, with_attention=self.with_attention)
        return seen

    @torch.no_grad()
    def _row(self, image_B3HW: Tensor) -> Tensor:
        """Tokens and attention of each uint8 image in one row, float32 (B, L N D) or (B, L N D + N)."""
        with self.setup.autocast():
            image_B3HW = self.teacher.normalise(image_B3HW)
            (seen,) = self.teacher.vit(image_B3HW, last=self.layers, with_attention=self.with_attention)
        parts = [seen.blocks_LBND.transpose(0, 1).flatten(1).float()]
        if seen.attention_BN is not None:
            parts.append(seen.attention_BN)
        return torch.cat(parts, dim=1)

    def _encoded(self, row_BF: Tensor) -> Encoded:
        width = self.teacher.vit.width
        patches = row_BF.shape[1] // (self.layers * width + self.with_attention)
        tokens_BF = row_BF[:, : self.layers * patches * width]
        blocks_LBND = tokens_BF.unflatten(1, (self.layers, patches, width)).transpose(0, 1)
        return Encoded(blocks_LBND, None, row_BF[:, -patches:] if self.with_attention else None)


def remove_tokens(setup: Setup) -> None:
    """Delete the run folder's copy, once the student is done."""
    if setup.accelerator.is_main_process:
        shutil.rmtree(setup.run / FOLDER, ignore_errors=True)
