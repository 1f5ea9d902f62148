"""A trained detector as scikit-learn sees one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from bigtrain.detectors.picture_judge import PictureJudge
from bigtrain.detectors.pictures import Given


class PictureEstimator(BaseEstimator):
    """A detector under scikit-learn's names and signs, in which higher = more normal; X is pictures.

        score_samples(X) = - novelty,   decision_function(X) = threshold - novelty,   predict(X) = 1 normal, -1 novel

    Args:
        detector: a loaded one.
        threshold: of novelty; None: the detector's own.
    """

    _estimator_type = "outlier_detector"

    def __init__(self, detector: PictureJudge, threshold: float | None = None) -> None:
        self.detector, self.threshold = detector, threshold

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Nothing is learnt: the detector is trained. Its threshold is set by `bigtrain calibrate`."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def score_samples(self, X: Iterable[Given]) -> NDArray[np.float64]:
        """Raises ValueError: a picture cannot be read, and is named, or its score is no number."""
        score_B = self.detector.score(X, unreadable="raise")
        if not np.isfinite(score_B).all():
            first = int(np.flatnonzero(~np.isfinite(score_B))[0])
            raise ValueError(
                f"the score of picture {first} (counted from 0) is {score_B[first]}: look for an overflow."
            )
        return -score_B

    def decision_function(self, X: Iterable[Given]) -> NDArray[np.float64]:
        """Raises ValueError: there is no threshold, or a picture cannot be read."""
        threshold = self.detector.scoring.threshold if self.threshold is None else self.threshold
        if threshold is None:
            raise ValueError("the detector has no threshold: give one, or set it with `bigtrain calibrate`.")
        return threshold + self.score_samples(X)

    def predict(self, X: Iterable[Given]) -> NDArray[np.int64]:
        return np.where(self.decision_function(X) < 0, -1, 1)
