"""A feature detector's score as a torch module, for graphs: what it has learned as buffers, the same formula."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bigtrain.detectors.feature_detector import FeatureDetector


class FeatureModule(nn.Module):
    """float32 features (B, D) to the score (B,), float64.

    Raises:
        ValueError: this kind of detector has no such form; it says why.
    """

    def __init__(self, detector: FeatureDetector) -> None:
        super().__init__()
        self.detector = detector
        for name, value in detector.torch_constants().items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)))

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.detector.score_torch(features_BD.double(), dict(self.named_buffers()))


def squared_distances(features_BD: Tensor, points_MD: Tensor) -> Tensor:
    """||x - p||^2 of each pair, (B, M): by the expanded square, around the points' mean, where less cancels."""
    centre_D = points_MD.mean(dim=0)
    features_BD, points_MD = features_BD - centre_D, points_MD - centre_D
    products_BM = features_BD @ points_MD.T
    squares_B1 = features_BD.square().sum(dim=1, keepdim=True)
    return (squares_B1 - 2 * products_BM + points_MD.square().sum(dim=1)).clamp(min=0)


def unit(features_BD: Tensor, norm: int = 2) -> Tensor:
    """Rows of length 1 (B, D); one of zeros stays so."""
    length_B1 = (
        features_BD.abs().sum(1, keepdim=True) if norm == 1 else features_BD.square().sum(1, keepdim=True).sqrt()
    )
    return features_BD / torch.where(length_B1 > 0, length_B1, torch.ones_like(length_B1))
