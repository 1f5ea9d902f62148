"""The losses of Perera & Patel, CVPR 2019: one value an image, so that padding can be weighted away."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from bigtrain.choices import Variant


def membership_loss(
    logits_BC: Tensor, class_B: Tensor, *, true_class_weight: float = 5.0, wrong_class_weight: float = 1.0
) -> Tensor:
    """Membership loss, Perera & Patel, CVPR 2019, eq. 3: the true class near 1, every other class near 0.

        l_B = w (1 - s_y)^2  +  v / (C-1) * sum_{i != y} s_i^2,   s = sigmoid(logits)

    Args:
        logits_BC: raw scores of B images for C >= 2 known classes.
        class_B: the true class, 0 .. C-1.
        true_class_weight, wrong_class_weight: w, the paper's lambda, and v; 1 and 5 in the authors' code.

    Returns:
        loss_B: float32, >= 0.

    Raises:
        ValueError: there is one class only.
    """
    classes = logits_BC.shape[1]
    if classes < 2:
        raise ValueError("the membership loss is about wrong classes too, and there is one class: name two at least.")
    membership_BC = logits_BC.float().sigmoid()
    is_true_BC = F.one_hot(class_B, classes).bool()
    missed_B = (1 - membership_BC).square().masked_fill(~is_true_BC, 0).sum(dim=1)
    false_alarm_B = membership_BC.square().masked_fill(is_true_BC, 0).sum(dim=1) / (classes - 1)
    return true_class_weight * missed_B + wrong_class_weight * false_alarm_B


def branch_losses(
    logits: Mapping[str, Tensor],
    class_B: Mapping[str, Tensor],
    *,
    ce_weight: float,
    membership_weight: float,
    first_class: Mapping[str, int] | None = None,
    true_class_weight: float = 5.0,
    variant: Variant = "paper",
) -> dict[str, Tensor]:
    """The terms of eq. 4 for each branch:

        known: alpha 1 L_ce + alpha 2 L_m      reference: L_ce

    Args:
        logits: of each branch's own images, (B, C); of a joint softmax, over the classes of both.
        class_B: the true class of each, among its branch's.
        ce_weight, membership_weight: alpha 1 and alpha 2.
        true_class_weight, variant: lambda of eq. 3, and of which classes: "author_code" weighs the wrong ones.
        first_class: of a joint softmax, the column at which each branch's classes begin.

    Returns:
        loss_B of each branch, float32.
    """
    first = first_class or {}
    losses = {
        name: F.cross_entropy(logits_BC.float(), class_B[name] + first.get(name, 0), reduction="none")
        for name, logits_BC in logits.items()
    }
    losses["known"] = ce_weight * losses["known"]
    if membership_weight:
        right, wrong = (1.0, true_class_weight) if variant == "author_code" else (true_class_weight, 1.0)
        membership_B = membership_loss(
            logits["known"], class_B["known"], true_class_weight=right, wrong_class_weight=wrong
        )
        losses["known"] = losses["known"] + membership_weight * membership_B
    return losses
