"""The equations of extreme value signatures: which features are extreme, and how novel an image is by them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def strongest(features_BD: Tensor, count: int) -> Tensor:
    """Which `count` features of each row are its largest: 1 and 0, as float32 (B, D)."""
    top_BK = features_BD.topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(features_BD, dtype=torch.float32).scatter_(1, top_BK, 1.0)


def signature_novelty(features_BD: Tensor, signature_CD: Tensor, count: int) -> Tensor:
    """Novelty of Schultheiss et al. 2017, in our reading: how little of a signature an image's own strongest features
    cover.

        s_B = 1 - max_c sum_{d in top(x)} signature_cd

    Our sources define a signature, but not its score. With rows of 1/count in the class's dimensions
    the sum is the share of them that the image has among its own; other rows weigh them.

    Args:
        signature_CD: float32; each row sums to 1 over the dimensions of the class's signature, and is 0 elsewhere.
        count: how many features of an image are its strongest, as many as a signature has.

    Returns:
        score_B, float32, 0 .. 1.
    """
    return 1 - (strongest(features_BD, count) @ signature_CD.T).amax(dim=1)


def signature_cosine_novelty(features_BD: Tensor, signature_CD: Tensor) -> Tensor:
    """1 - max_c cos(x, signature_c), float64: no choice among the image's features. See `signature_novelty`.

    As half of the squared distance of the unit vectors, which does not cancel where they are near.
    """
    features_BD, signature_CD = F.normalize(features_BD.double(), dim=1), F.normalize(signature_CD.double(), dim=1)
    return torch.cdist(features_BD, signature_CD, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).square() / 2
