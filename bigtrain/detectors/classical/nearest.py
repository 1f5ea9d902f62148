"""Nearest neighbours on features: the baseline for every method (DN2, Bergman, Cohen & Hoshen 2020)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from bigtrain.detectors.feature_detector import FeatureDetector, Floats, Ints
from bigtrain.detectors.feature_module import squared_distances


class NearestNeighbours(FeatureDetector):
    """Novelty = sum of the squared L2 distances to the `neighbours` nearest known images.

    Args:
        neighbours: 2 in DN2; at most as many as there are known images.
    """

    def __init__(self, neighbours: int = 2) -> None:
        self.neighbours = neighbours

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        self.known_ND_ = features_ND

    def _score(self, features_ND: Floats) -> Floats:
        from sklearn.neighbors import NearestNeighbors as Index

        index = Index(n_neighbors=min(self.neighbours, len(self.known_ND_)), algorithm="brute").fit(self.known_ND_)
        near_NK = index.kneighbors(features_ND, return_distance=False)
        # again, from the differences: the index expands the square, and what is near cancels
        return sum(np.square(features_ND - self.known_ND_[near_N]).sum(axis=1) for near_N in near_NK.T)

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        known_ND = constants["known_ND_"]
        count = min(self.neighbours, len(self.known_ND_))
        near_BK = (-squared_distances(features_BD, known_ND)).topk(count, dim=1).indices
        return (features_BD[:, None] - known_ND[near_BK]).square().sum(dim=(1, 2))


def pixel_features(image_B3HW: Tensor) -> Tensor:
    """The picture itself as features: uint8 images scaled to 32 x 32, as float32 (B, 3072) in 0 .. 1."""
    small = F.interpolate(image_B3HW.float(), size=(32, 32), mode="bilinear", antialias=True, align_corners=False)
    return small.flatten(1) / 255


def token_features(tokens_BND: Tensor) -> Tensor:
    """What a ViT sees in a picture: the mean of its L2-normalised patch tokens, L2-normalised; float32 (B, D)."""
    return F.normalize(F.normalize(tokens_BND.float(), dim=-1).mean(dim=1), dim=-1)
