"""Novelty scores: higher = more novel, raw."""

from __future__ import annotations

from torch import Tensor

from bigtrain.objectives.losses import Distance, Normalisation, patch_distance


def distillation_score(
    student_LBND: Tensor,
    teacher_LBND: Tensor,
    *,
    normalisation: Normalisation = "l2",
    normalise_student: bool = True,
    distance: Distance = "squared",
) -> tuple[Tensor, Tensor]:
    """Novelty of DEFEND 3.3: how far the student, which saw every patch, is from the teacher.

        s_B = mean_N map_BN,   map_BN = mean_L || norm(F_t) - norm(F_s) ||^2

    Args:
        student_LBND, teacher_LBND: tokens of all N patches, unmasked, of the last L blocks; no class token.
        normalisation, normalise_student, distance: as in training, see `distillation_loss`.

    Returns:
        score_B and map_BN, float32, >= 0; exactly 0 where student and teacher agree.
    """
    map_BN = patch_distance(
        student_LBND, teacher_LBND, normalisation=normalisation, normalise_student=normalise_student, distance=distance
    )
    return map_BN.mean(dim=1), map_BN
