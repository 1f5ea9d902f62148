"""How far apart a student's and a teacher's tokens are, patch by patch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from bigtrain.choices import Distance, Normalisation


def patch_distance(
    predicted_LBND: Tensor,
    target_LBND: Tensor,
    *,
    normalisation: Normalisation = "l2",
    normalise_student: bool = True,
    distance: Distance = "squared",
) -> Tensor:
    """|| norm(F_t) - norm(F_s) ||^2 for each patch, mean over blocks: float32 (B, N).

    Args:
        predicted_LBND: the student's tokens of L blocks, B images, N patches.
        target_LBND: the teacher's; carries no gradient.
        normalisation: of each token: "l2", "layer" (zero mean, unit variance) or "none".
        normalise_student: False normalises the teacher only.
        distance: "squared", or "smooth_l1", summed over features alike.
    """
    target_LBND = normalised(target_LBND.float().detach(), normalisation)
    predicted_LBND = predicted_LBND.float()
    if normalise_student:
        predicted_LBND = normalised(predicted_LBND, normalisation)
    return DISTANCES[distance](predicted_LBND, target_LBND).sum(dim=-1).mean(dim=0)


DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {  # of each feature; named in bigtrain.choices
    "squared": lambda predicted, target: (target - predicted).square(),
    "smooth_l1": lambda predicted, target: F.smooth_l1_loss(predicted, target, reduction="none"),
}


def normalised(tokens: Tensor, normalisation: Normalisation) -> Tensor:
    """Tokens (..., D) as they are compared; see `patch_distance`."""
    if normalisation == "l2":
        return F.normalize(tokens, dim=-1)
    return F.layer_norm(tokens, tokens.shape[-1:]) if normalisation == "layer" else tokens
