"""A linear classifier on any trunk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bigtrain.models.network import trunk_width
from bigtrain.models.vit import ViT


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
