"""The network of Perera & Patel, CVPR 2019: one trunk, a head for each data set."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from bigtrain.models.network import trunk_width


class Branches(nn.Module):
    """One trunk and a linear head for each data set (Perera & Patel 4.4, fig. 4): two branches with the same weights.

    Args:
        classes: name of a branch -> how many classes its head has. New heads begin at N(0, .01) with bias 0.
        joint: all heads answer for each image, side by side, as one of all classes.
    """

    def __init__(self, trunk: nn.Module, classes: Mapping[str, int], *, joint: bool = False) -> None:
        super().__init__()
        self.trunk, self.joint = trunk, joint
        self.heads = nn.ModuleDict({name: nn.Linear(trunk_width(trunk), count) for name, count in classes.items()})
        for head in self.linear_heads().values():
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits for each branch's own images, which go through the trunk as one batch."""
        sizes = [len(image_B3HW) for image_B3HW in images.values()]
        features = self.trunk(torch.cat(list(images.values()))).split(sizes)
        of_branch = dict(zip(images, features, strict=True))
        if self.joint:
            return {n: torch.cat([h(part_BD) for h in self.heads.values()], dim=1) for n, part_BD in of_branch.items()}
        return {name: self.heads[name](part_BD) for name, part_BD in of_branch.items()}

    @property
    def first_class(self) -> dict[str, int]:
        """Of a joint softmax, the column at which each branch's classes begin; else all begin at 0."""
        heads = self.linear_heads()
        counts = accumulate((head.out_features for head in heads.values()), initial=0)
        return dict(zip(heads, counts, strict=False)) if self.joint else {}

    def linear_heads(self) -> dict[str, nn.Linear]:
        return {name: head for name, head in self.heads.items() if isinstance(head, nn.Linear)}
