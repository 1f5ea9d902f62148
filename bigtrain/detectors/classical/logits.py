"""A classifier's own answer as novelty; `fit` learns nothing but how many classes there are."""

from __future__ import annotations

from scipy.special import logsumexp

from bigtrain.detectors.feature_detector import FeatureDetector, Floats


class MaxLogit(FeatureDetector):
    """Novelty = - max_c f_c: no known class answers ("Finetune" in Perera & Patel, Table 1)."""

    def _score(self, features_ND: Floats) -> Floats:
        return -features_ND.max(axis=1)


class MaxSoftmax(FeatureDetector):
    """Novelty = - log max_c softmax(f)_c (Hendrycks & Gimpel 2017); the logarithm does not saturate."""

    def _score(self, features_ND: Floats) -> Floats:
        return logsumexp(features_ND, axis=1) - features_ND.max(axis=1)
