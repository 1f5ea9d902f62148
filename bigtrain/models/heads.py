"""What is put on a trunk: the projection head and prototypes of dense tuning, a classifier."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.backbone import trunk_width
from bigtrain.models.vit import ViT


class ProjectionHead(nn.Sequential):
    """Three linear layers with GELU between them (DEFEND 4.2: hidden 2048, output 256); its output is L2-normalised."""

    def __init__(self, width: int, hidden: int = 2048, output: int = 256) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, output)
        )

    def forward(self, tokens_TD: Tensor) -> Tensor:
        return F.normalize(super().forward(tokens_TD), dim=-1)


def unit_rows(weight_KD: Tensor) -> Tensor:
    """Prototypes put back on the sphere; after each update."""
    return F.normalize(weight_KD, dim=1)


class Prototypes(nn.Module):
    """K learnable unit vectors; gives the cosine of each projected token with each of them (DEFEND 3.1)."""

    def __init__(self, count: int, width: int = 256) -> None:
        super().__init__()
        self.weight_KD = nn.Parameter(unit_rows(torch.randn(count, width)))

    def forward(self, projected_TD: Tensor) -> Tensor:
        return F.linear(projected_TD, self.weight_KD)


class Classifier(nn.Module):
    """A trunk with a linear classifier: on a ViT's [CLS] token, or on that and the mean of its patch tokens ("both").

    "both" makes the patch tokens carry what the classes are about, which dense methods build on. Of any other trunk it
    is on its features.
    """

    def __init__(self, trunk: ViT | nn.Module, classes: int, pool: Literal["token", "both"] = "token") -> None:
        super().__init__()
        self.trunk, self.pool = trunk, pool
        width = trunk.width if isinstance(trunk, ViT) else trunk_width(trunk)
        self.head = nn.Linear(width * (2 if pool == "both" else 1), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        if not isinstance(self.trunk, ViT):
            return self.head(self.trunk(images_B3HW))
        (encoded,) = self.trunk(images_B3HW)
        if encoded.class_BD is None:
            return self.head(encoded.tokens_BND.mean(dim=1))
        parts = [encoded.class_BD] + ([encoded.tokens_BND.mean(dim=1)] if self.pool == "both" else [])
        return self.head(torch.cat(parts, dim=1))


class DenseTuner(nn.Module):
    """The trained part of dense tuning (DEFEND 3.1) as one module: a trunk, the projection head g, the prototypes p.

    Only the last `tuned_blocks` blocks of the trunk learn, beside head and prototypes.
    """

    def __init__(self, vit: ViT, prototypes: int, tuned_blocks: int) -> None:
        super().__init__()
        depth = len(vit.backbone.blocks)
        if not 1 <= tuned_blocks <= depth:
            raise ValueError(
                f"the last {tuned_blocks} blocks were to be tuned, of a network with {depth}; use 1 to that."
            )
        self.vit, self.head, self.prototypes = vit, ProjectionHead(vit.width), Prototypes(prototypes)
        vit.requires_grad_(False)
        vit.backbone.blocks[depth - tuned_blocks :].requires_grad_(True)

    def forward(self, *views: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Project patch tokens and compare them with the prototypes; all views are encoded in one packed pass.

        Args:
            views: whole images (B, 3, H, W), or kinds of crops of them (B V, 3, h, w). A single view with two axes is
                one of projected tokens, z_TD, to be compared only.

        Returns:
            z of each view, (B, N, D), and the cosines z' p, (B, N, K).
        """
        projected = views[0].ndim == 2
        z = list(views) if projected else [self.head(view.tokens_BND) for view in self.vit(*views)]
        return z, [self.prototypes(z_TD) for z_TD in z]


class TokenQueue(nn.Module):
    """The newest projected tokens of all ranks, the same on each: it steadies Sinkhorn where a batch has few tokens."""

    def __init__(self, length: int, width: int = 256) -> None:
        super().__init__()
        self.z_QD: Tensor
        self.filled: Tensor
        self.register_buffer("z_QD", torch.zeros(length, width))
        self.register_buffer("filled", torch.tensor(0))

    def full(self) -> bool:
        return int(self.filled) == len(self.z_QD)

    def share(self, rank: int, world_size: int) -> Tensor:
        """This rank's part, so that the parts of all ranks are the queue once."""
        return self.z_QD.tensor_split(world_size)[rank]

    def push(self, z_TD: Tensor) -> None:
        """Append the tokens of all ranks, in their order; the oldest leave."""
        newest = torch.cat([self.z_QD, z_TD.float()])[-len(self.z_QD) :]
        self.z_QD.copy_(newest)
        self.filled.fill_(min(len(self.z_QD), int(self.filled) + len(z_TD)))
