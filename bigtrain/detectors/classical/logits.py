"""A classifier's own answer as novelty; `fit` learns nothing but how many classes there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bigtrain.detectors.feature_detector import FeatureDetector, Floats

if TYPE_CHECKING:
    from torch import Tensor


class MaxLogit(FeatureDetector):
    """Novelty = - max_c f_c: no known class answers ("Finetune" in Perera & Patel, Table 1)."""

    def _score(self, features_ND: Floats) -> Floats:
        return -features_ND.max(axis=1)

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        return -features_BD.amax(dim=1)


class MaxSoftmax(FeatureDetector):
    """Novelty = - log max_c softmax(f)_c (Hendrycks & Gimpel 2017) = log(1 + sum_{c != max} e^(f_c - f_max)).

    In this form it keeps its order where the network is sure: it does not saturate, and nothing cancels.
    """

    def _score(self, features_ND: Floats) -> Floats:
        behind_ND = np.sort(features_ND, axis=1)
        return np.log1p(np.exp(behind_ND[:, :-1] - behind_ND[:, -1:]).sum(axis=1))

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        falling_BC = features_BD.topk(features_BD.shape[1], dim=1).values
        return (falling_BC[:, 1:] - falling_BC[:, :1]).exp().sum(dim=1).log1p()
