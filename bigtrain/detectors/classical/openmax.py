"""OpenMax: Bendale & Boult, "Towards Open Set Deep Networks", CVPR 2016."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import weibull_min

from bigtrain.detectors.feature_detector import FeatureDetector, Floats, Ints, unit_rows
from bigtrain.detectors.feature_module import squared_distances, unit

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
EUCLIDEAN_SCALE = 200.0  # of the authors' code: distances between logits are that much longer than cosines


class OpenMax(FeatureDetector):
    """The highest logits lose to an unknown class, the more the further the image is from the class's mean.

    The mean vector of each class is that of its images which the network classifies correctly. A Weibull distribution,
    moved so that its smallest value is 1, is fitted to the `tail` largest of their distances ||x - m||/200 + 1 - cos(x,
    m). For rank i = 0 .. alpha - 1 among an image's logits v, with F its class's distribution function:

        w_i = (alpha - i)/alpha F(distance),   v'_i = v_i (1 - w_i),   v'_unknown = sum_i v_i w_i

    Novelty = v'_unknown - logsumexp(v'_known): the log of the odds of "unknown" in OpenMax, which does not saturate.

    `fit` and `score` take logits, a column for each class in sorted order. The authors call these the penultimate
    layer, the last before the softmax.

    Args:
        tail: 20.
        alpha: 10; at most the number of classes.
    """

    fewest_classes: ClassVar[int] = 2

    def __init__(self, tail: int = 20, alpha: int = 10) -> None:
        if tail < 2 or alpha < 1:
            raise ValueError(f"OpenMax was given tail {tail} and alpha {alpha}; they must be at least 2 and 1.")
        self.tail, self.alpha = tail, alpha

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        classes = len(self.classes_)
        if features_ND.shape[1] != classes:
            raise ValueError(
                f"OpenMax takes logits, one for each of the {classes} known classes, and rows of "
                f"{features_ND.shape[1]} were given: give the output of a classifier of the known classes."
            )
        is_right_N = features_ND.argmax(axis=1) == class_N
        self.mean_CC_ = np.empty((classes, classes))
        self.weibull_C3_ = np.empty((classes, 3))  # shape, scale, and what is added to a distance
        for number in range(classes):
            own_MC = features_ND[(class_N == number) & is_right_N]
            if len(own_MC) < 2:
                log.warning(
                    "OpenMax: %d image(s) of class %s classified correctly: using all of its images.",
                    len(own_MC),
                    self.classes_[number],
                )
                own_MC = features_ND[class_N == number]
            self.mean_CC_[number] = own_MC.mean(axis=0)
            tail_T = np.sort(distance(own_MC, self.mean_CC_[number]))[-self.tail :]
            if len(tail_T) < 2 or tail_T[0] == tail_T[-1]:
                raise ValueError(
                    f"OpenMax has nothing to fit a distribution to: the {len(tail_T)} images of class "
                    f"{self.classes_[number]} lie at the same distance to their mean. Give more images of it."
                )
            moved = 1 - float(tail_T[0])
            shape, _, scale = weibull_min.fit(tail_T + moved, floc=0)
            self.weibull_C3_[number] = shape, scale, moved

    def _score(self, features_ND: Floats) -> Floats:
        distance_NC = np.stack([distance(features_ND, mean_C) for mean_C in self.mean_CC_], axis=1)
        shape_C, scale_C, moved_C = self.weibull_C3_.T
        with np.errstate(over="ignore"):  # far beyond the scale it is 1
            outlying_NC = weibull_min.cdf(distance_NC + moved_C, shape_C, scale=scale_C)
        alpha = min(self.alpha, len(self.classes_))
        order_NC = np.argsort(-features_ND, axis=1, kind="stable")
        rank_NC = np.argsort(order_NC, axis=1, kind="stable")
        weight_NC = np.clip((alpha - rank_NC) / alpha, 0, None) * outlying_NC
        unknown_N = (features_ND * weight_NC).sum(axis=1)
        return unknown_N - logsumexp(features_ND * (1 - weight_NC), axis=1)

    def torch_constants(self) -> dict[str, NDArray[Any]]:
        alpha = min(self.alpha, len(self.classes_))
        constants = dict(zip(("shape_C", "scale_C", "moved_C"), self.weibull_C3_.T, strict=True))
        return {**constants, "mean_CC": self.mean_CC_, "falling_A": (alpha - np.arange(alpha)) / alpha}

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        mean_CC, falling_A = constants["mean_CC"], constants["falling_A"]
        euclidean_BC = squared_distances(features_BD, mean_CC).sqrt()
        distance_BC = euclidean_BC / EUCLIDEAN_SCALE + 1 - unit(features_BD) @ unit(mean_CC).T
        scaled_BC = ((distance_BC + constants["moved_C"]).clamp(min=0) / constants["scale_C"]) ** constants["shape_C"]
        top_BA = features_BD.topk(falling_A.shape[0], dim=1).indices
        rank_BC = features_BD * 0
        weight_BC = rank_BC.scatter(1, top_BA, falling_A.expand_as(top_BA)) * (1 - (-scaled_BC).exp())
        unknown_B = (features_BD * weight_BC).sum(dim=1)
        return unknown_B - (features_BD * (1 - weight_BC)).logsumexp(dim=1)


def distance(features_ND: Floats, mean_D: Floats) -> Floats:
    """Euclidean and cosine distance to a mean vector, added as the authors do."""
    euclidean_N = np.linalg.norm(features_ND - mean_D, axis=1)
    return euclidean_N / EUCLIDEAN_SCALE + 1 - unit_rows(features_ND) @ unit_rows(mean_D[None])[0]
