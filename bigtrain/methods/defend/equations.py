"""The equations of DEFEND: losses (one value an image, so that padding can be weighted away) and the score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.choices import Distance, Normalisation, Predict, ScoreOver
from bigtrain.models.masking import take, visible_numbers
from bigtrain.objectives.token_distances import patch_distance


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
    # torchvision.ops.roi_align takes a slow path, for its gradient's sake, when torch is deterministic
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


def multi_crop_loss(
    cosines: Sequence[Tensor],
    assignment_BhwK: Tensor,
    crops: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    patch_size: int,
    temperature: float = 0.1,
) -> Tensor:
    """Dense loss over kinds of crops (small ones, and global ones where there are any), each weighing by its number.

    Args:
        cosines: of each kind, (B V, M, K): its crops' patches with the prototypes.
        assignment_BhwK: Q over the whole images' patch grid.
        crops: of each kind, (B, V, 3, height, width).
        boxes: of each kind, (B, V, 4): where its crops lie in the image.

    Returns:
        loss_B: float32, >= 0.
    """
    count = sum(box_BV4.shape[1] for box_BV4 in boxes)
    loss_B = torch.zeros(len(assignment_BhwK), device=assignment_BhwK.device)
    for cosines_RMK, crop_BV3HW, box_BV4 in zip(cosines, crops, boxes, strict=True):
        grid = (crop_BV3HW.shape[-2] // patch_size, crop_BV3HW.shape[-1] // patch_size)
        target_BVMK = align_to_crops(assignment_BhwK, box_BV4, patch_size=patch_size, grid=grid)  # alpha(Q)
        cosines_BVMK = cosines_RMK.unflatten(0, box_BV4.shape[:2])
        share = box_BV4.shape[1] / count
        loss_B = loss_B + share * dense_loss(cosines_BVMK, target_BVMK, temperature=temperature)  # eq. 1
    return loss_B


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
        where = visible_numbers(visible_BN, predicted_LBMD.shape[2])
        target_LBND = torch.stack([take(target_BND, where) for target_BND in target_LBND])
    distance_BM = patch_distance(
        predicted_LBMD, target_LBND, normalisation=normalisation, normalise_student=normalise_student, distance=distance
    )
    if visible_BN is not None and predict == "hidden":
        return (distance_BM * ~visible_BN).sum(dim=1) / (~visible_BN).sum(dim=1)
    return distance_BM.mean(dim=1)


def picture_score(
    map_BN: Tensor, over: ScoreOver = "mean", *, quantile: float = 0.25, attention_BN: Tensor | None = None
) -> Tensor:
    """Novelty of pictures from that of their patches.

        "mean"      mean_N map_BN                         DEFEND 3.3: every patch must be explained
        "quantile"  the q-quantile of a picture's patches: known if a share q of them is, whatever the others are
        "attended"  the mean over the half of the patches that the teacher's [CLS] attends to most

    A picture of many objects is known if any of them is (4.4), which a mean over all patches does not ask.

    Args:
        map_BN: of `patch_distance`.
        quantile: q, within (0, 1); linear between patches.
        attention_BN: attention of the teacher's [CLS], for "attended".

    Returns:
        score_B, float32.
    """
    if over == "quantile":
        return map_BN.quantile(quantile, dim=1)
    if over == "attended":
        assert attention_BN is not None
        most_BM = attention_BN.topk(max(1, map_BN.shape[1] // 2), dim=1).indices
        map_BN = map_BN.gather(1, most_BM)
    return map_BN.mean(dim=1)
