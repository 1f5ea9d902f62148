"""The papers' losses: one value for each image, so that padding can be weighted away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.choices import Distance, Normalisation, Predict


def align_to_crops(assignment_BhwK: Tensor, box_BV4: Tensor, *, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """alpha(Q) of DEFEND eq. 1: the part of each image's assignment map under each of its crops, on the crop's patch
    grid.

    RoIAlign (He et al. 2017, half-pixel aligned) of the soft map, so that box edges between patches interpolate.

    Args:
        assignment_BhwK: soft assignments of the image's patches.
        box_BV4: each crop's own box in pixels of the image: top, left, bottom, right.
        patch_size: pixels of the image for each patch of the map.
        grid: patches of a crop, (height, width).

    Returns:
        target_BVMK: M = height x width patches of each of V crops; rows of sum 1 stay so.
    """
    import torchvision  # noqa: F401  # for its operation, in torch.ops

    crops = box_BV4.shape[1]
    top, left, bottom, right = box_BV4.float().unbind(-1)
    image_BV = torch.arange(len(box_BV4), device=box_BV4.device)[:, None].expand(-1, crops)
    roi_R5 = torch.stack([image_BV, left, top, right, bottom], dim=-1).flatten(0, 1)
    map_BKhw = assignment_BhwK.float().permute(0, 3, 1, 2).contiguous()
    # torchvision.ops.roi_align would take a slow form for the sake of its gradient where torch is to be deterministic
    out = torch.ops.torchvision.roi_align(map_BKhw, roi_R5, 1 / patch_size, *grid, -1, True)
    return out.flatten(2).transpose(1, 2).unflatten(0, (-1, crops))


def dense_loss(logits_BVMK: Tensor, target_BVMK: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Dense loss, DEFEND eq. 1: cross-entropy between a crop's assignment and that of the image under it.

        l_B = mean_{V, M} [ - sum_k alpha(Q)_k log softmax(z' p_k / temperature) ]

    Args:
        logits_BVMK: cosines of the projected tokens of V crops, M patches each, with K prototypes.
        target_BVMK: alpha(Q); carries no gradient.

    Returns:
        loss_B: float32, >= 0.
    """
    log_predicted = F.log_softmax(logits_BVMK.float() / temperature, dim=-1)
    return -(target_BVMK.float().detach() * log_predicted).sum(dim=-1).flatten(1).mean(dim=1)


def distillation_loss(
    predicted_LBMD: Tensor,
    target_LBND: Tensor,
    visible_BN: Tensor | None = None,
    *,
    predict: Predict = "visible",
    normalisation: Normalisation = "l2",
    normalise_student: bool = True,
    distance: Distance = "squared",
) -> Tensor:
    """Masked distillation, DEFEND eq. 3 and 4: squared distance of normalised tokens on the patches to predict.

        l_B = mean_{L, m} || norm(F_t) - norm(F_s) ||^2

    Summed over features, and a mean over blocks and tokens: with "l2" it lies in [0, 4]. The class token takes no part.
    The authors' code takes the loss on the patches that the student sees; the paper's text, that the student infers
    "the full context by only partially observing the input" (3.2), asks for the hidden ones, or all.

    Args:
        predicted_LBMD: the student's tokens of the last L blocks: of the n visible patches in order ("visible"), or of
            all N, completed ("hidden", "all").
        target_LBND: the teacher's, for all N patches; carries no gradient.
        visible_BN: bool, equally many True in each row; None: all are visible.
        predict: on which patches the loss is.
        normalisation: of each token: "l2" (the paper), "layer" (zero mean, unit variance) or "none".
        normalise_student: False normalises the teacher only (4.6, pixel level).
        distance: "squared", or "smooth_l1" (4.6), summed over features alike.

    Returns:
        loss_B: float32, >= 0.
    """
    if visible_BN is not None and predict == "visible":
        target_LBND = target_LBND[:, visible_BN].unflatten(1, (visible_BN.shape[0], -1))
    elif visible_BN is not None and predict == "hidden":
        hidden_BN = ~visible_BN
        predicted_LBMD, target_LBND = (
            tokens[:, hidden_BN].unflatten(1, (hidden_BN.shape[0], -1)) for tokens in (predicted_LBMD, target_LBND)
        )
    return patch_distance(
        predicted_LBMD, target_LBND, normalisation=normalisation, normalise_student=normalise_student, distance=distance
    ).mean(dim=1)


def patch_distance(
    predicted_LBND: Tensor,
    target_LBND: Tensor,
    *,
    normalisation: Normalisation = "l2",
    normalise_student: bool = True,
    distance: Distance = "squared",
) -> Tensor:
    """|| norm(F_t) - norm(F_s) ||^2 for each patch, mean over blocks: float32 (B, N). See `distillation_loss`."""
    target_LBND = normalised(target_LBND.float().detach(), normalisation)
    predicted_LBND = predicted_LBND.float()
    if normalise_student:
        predicted_LBND = normalised(predicted_LBND, normalisation)
    if distance == "squared":
        per_feature = (target_LBND - predicted_LBND).square()
    else:
        per_feature = F.smooth_l1_loss(predicted_LBND, target_LBND, reduction="none")
    return per_feature.sum(dim=-1).mean(dim=0)


def membership_loss(logits_BC: Tensor, class_B: Tensor, *, true_class_weight: float = 5.0) -> Tensor:
    """Membership loss, Perera & Patel, CVPR 2019, eq. 3: the true class near 1, every other class near 0.

        mean_B [ w (1 - s_y)^2  +  1/(C-1) * sum_{i != y} s_i^2 ],   s = sigmoid(logits)

    Args:
        logits_BC: raw scores of B images for C >= 2 known classes.
        class_B: the true class, 0 .. C-1.
        true_class_weight: w, the paper's lambda.

    Returns:
        A float32 scalar >= 0.

    Raises:
        ValueError: there is one class only.
    """
    return membership_risk(logits_BC, class_B, true_class_weight=true_class_weight).mean()


def membership_risk(
    logits_BC: Tensor, class_B: Tensor, *, true_class_weight: float = 5.0, wrong_class_weight: float = 1.0
) -> Tensor:
    """What `membership_loss` is the mean of: float32 (B,). The authors' code weighs the other term: 1 and 5."""
    classes = logits_BC.shape[1]
    if classes < 2:
        raise ValueError("the membership loss is about wrong classes too, and there is one class: name two at least.")
    membership_BC = logits_BC.float().sigmoid()
    is_true_BC = F.one_hot(class_B, classes).bool()
    missed_B = (1 - membership_BC[is_true_BC]).square()
    false_alarm_B = membership_BC.square().masked_fill(is_true_BC, 0).sum(dim=1) / (classes - 1)
    return true_class_weight * missed_B + wrong_class_weight * false_alarm_B


def normalised(tokens: Tensor, normalisation: Normalisation) -> Tensor:
    """Tokens (..., D) as they are compared; see `distillation_loss`."""
    if normalisation == "l2":
        return F.normalize(tokens, dim=-1)
    return F.layer_norm(tokens, tokens.shape[-1:]) if normalisation == "layer" else tokens
