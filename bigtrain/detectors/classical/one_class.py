"""A boundary around what is known: one-class SVM (Schoelkopf et al. 2001) and SVDD (Tax & Duin 2004), both with RBF.

With a kernel whose k(x, x) is 1 both solve the same problem: SVDD's sphere is the SVM's plane, so libsvm fits either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.linalg import block_diag
from sklearn.metrics import pairwise_distances_chunked
from sklearn.svm import OneClassSVM as Solver

from bigtrain.detectors.feature_detector import FeatureDetector, Floats, Ints
from bigtrain.detectors.feature_module import squared_distances

if TYPE_CHECKING:
    from torch import Tensor


class _Boundaries(FeatureDetector):
    """One boundary a class, or one around all: sum_i w_i k(x_i, x) against an offset.

    The kernel is exp(-gamma ||x - y||^2) with gamma = 1 / (D var), over all classes, so that their values compare.
    """

    per_class: ClassVar[bool]

    def __init__(self, nu: float = 0.1) -> None:
        if not 0 < nu <= 1:
            raise ValueError(
                f"nu is {nu}; it bounds the share of known images outside, and must be above 0 and at most 1."
            )
        self.nu = nu

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        part_N = class_N if self.per_class else np.zeros_like(class_N)
        parts = int(part_N.max()) + 1
        self.gamma_ = float(1 / (features_ND.shape[1] * (features_ND.var() or 1.0)))
        fitted = []
        for part in range(parts):
            own_MD = features_ND[part_N == part]
            solver = Solver(kernel="rbf", gamma=self.gamma_, nu=self.nu, tol=1e-6).fit(own_MD)
            # weights that sum to 1: libsvm's sum to nu n
            total = float(solver.dual_coef_.sum())
            fitted.append((solver.support_vectors_, solver.dual_coef_[0] / total, -float(solver.intercept_[0]) / total))
        supports, weights, offsets = zip(*fitted, strict=True)
        self.support_SD_, self.offset_C_ = np.concatenate(supports), np.array(offsets)
        self.weight_SC_ = block_diag(*[weight_M[:, None] for weight_M in weights])

    def _similarity(self, features_ND: Floats) -> Floats:
        """sum_i w_i k(x_i, x) for each boundary: (N, C)."""
        chunks = pairwise_distances_chunked(
            features_ND,
            self.support_SD_,
            metric="sqeuclidean",
            reduce_func=lambda distance_MS, start: np.exp(-self.gamma_ * distance_MS) @ self.weight_SC_,
        )
        return np.concatenate(list(chunks))

    def _similarity_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        """As `_similarity`: (B, C)."""
        return (-self.gamma_ * squared_distances(features_BD, constants["support_SD_"])).exp() @ constants["weight_SC_"]


class OneClassSVM(_Boundaries):
    """Novelty = min_c [ rho_c - sum_i w_i k(x_i, x) ], above 0 outside of every class (Perera & Patel 5.1, method 2).

    Args:
        nu: largest share of a class's images outside of its boundary.
    """

    per_class = True

    def _score(self, features_ND: Floats) -> Floats:
        return (self.offset_C_ - self._similarity(features_ND)).min(axis=1)

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        return (constants["offset_C_"] - self._similarity_torch(features_BD, constants)).amin(dim=1)


class SVDD(_Boundaries):
    """The smallest sphere around all known images in the kernel's space; novelty = ||phi(x) - a||^2 - R^2.

        ||phi(x) - a||^2 = 1 - 2 sum_i w_i k(x_i, x) + sum_ij w_i w_j k(x_i, x_j),   C = 1 / (nu n)

    Args:
        nu: largest share of images outside of the sphere.
    """

    per_class = False

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        super()._fit(features_ND, class_N)
        # at the edge of the plane, sum_i w_i k(x_i, x) = rho, lies the edge of the sphere
        self.squared_centre_ = float(self.weight_SC_[:, 0] @ self._similarity(self.support_SD_)[:, 0])
        self.squared_radius_ = 1 - 2 * float(self.offset_C_[0]) + self.squared_centre_

    def _score(self, features_ND: Floats) -> Floats:
        distance_N = 1 - 2 * self._similarity(features_ND)[:, 0] + self.squared_centre_
        return distance_N - self.squared_radius_

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        similarity_B = self._similarity_torch(features_BD, constants)[:, 0]
        return 1 - 2 * similarity_B + self.squared_centre_ - self.squared_radius_
