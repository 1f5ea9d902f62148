"""A classifier's own answer as novelty; `fit` learns nothing but how many classes there are."""

from __future__ import annotations

import numpy as np

from bigtrain.detectors.feature_detector import FeatureDetector, Floats


class MaxLogit(FeatureDetector):
    """Novelty = - max_c f_c: no known class answers ("Finetune" in Perera & Patel, Table 1)."""

    def _score(self, features_ND: Floats) -> Floats:
        return -features_ND.max(axis=1)


class MaxSoftmax(FeatureDetector):
    """Novelty = - log max_c softmax(f)_c (Hendrycks & Gimpel 2017) = log(1 + sum_{c != max} e^(f_c - f_max)).

    In this form it keeps its order where the network is sure: it does not saturate, and nothing cancels.
    """

    def _score(self, features_ND: Floats) -> Floats:
        behind_ND = np.sort(features_ND, axis=1)
        return np.log1p(np.exp(behind_ND[:, :-1] - behind_ND[:, -1:]).sum(axis=1))
