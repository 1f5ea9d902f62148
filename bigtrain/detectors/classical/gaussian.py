"""Gaussian densities of the known features: Mahalanobis distance (Lee et al. 2018) and a mixture of Gaussians."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture as Solver

from bigtrain.detectors.feature_detector import FeatureDetector, Floats, Ints, class_means
from bigtrain.detectors.feature_module import squared_distances

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_VARIANCE = 1e-10  # of the mean one


class Mahalanobis(FeatureDetector):
    """Novelty = min_c (x - m_c)' S^-1 (x - m_c): class means, one covariance for all, Ledoit & Wolf's shrunk one.

    Shrinkage keeps it a distance where there are fewer images than features.
    """

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        self.mean_CD_ = class_means(features_ND, class_N)
        residual_ND = features_ND - self.mean_CD_[class_N]
        if not np.square(residual_ND).sum() > 1e-20 * np.square(features_ND).sum():
            raise ValueError(
                "the images of each known class have equal features (or there is one image a class), so there is no "
                "covariance: give more images."
            )
        within = LedoitWolf(assume_centered=True).fit(residual_ND)
        value_D = np.linalg.eigvalsh(within.covariance_)
        floor = value_D.mean() * SMALLEST_VARIANCE  # features that never vary
        lacking = max(floor - value_D[0], 0.0)
        self.precision_DD_ = (
            np.linalg.inv(within.covariance_ + lacking * np.eye(len(value_D))) if lacking else within.precision_
        )

    def _score(self, features_ND: Floats) -> Floats:
        # distances between whitened features: cdist's own "mahalanobis" is many times slower
        root_DD = np.linalg.cholesky(self.precision_DD_)
        return cdist(features_ND @ root_DD, self.mean_CD_ @ root_DD, "sqeuclidean").min(axis=1)

    def torch_constants(self) -> dict[str, NDArray[Any]]:
        root_DD, centre_D = np.linalg.cholesky(self.precision_DD_), self.mean_CD_.mean(axis=0)
        return {"root_DD": root_DD, "centre_D": centre_D, "white_CD": (self.mean_CD_ - centre_D) @ root_DD}

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        white_BD = (features_BD - constants["centre_D"]) @ constants["root_DD"]
        return squared_distances(white_BD, constants["white_CD"]).amin(dim=1)


class GaussianMixture(FeatureDetector):
    """Novelty = -log p(x) under a mixture of Gaussians with diagonal covariances, fitted to all known images.

    Args:
        components: 0: as many as there are known classes.
        seed: of where it begins.
    """

    def __init__(self, components: int = 0, seed: int = 0) -> None:
        self.components, self.seed = components, seed

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        components = self.components or len(self.classes_)
        if len(features_ND) < 2:
            raise ValueError("a Gaussian has a spread, and there is a single known image: give more.")
        if components > len(features_ND):
            raise ValueError(
                f"a mixture of {components} Gaussians was asked for, and there are {len(features_ND)} known images: "
                "ask for fewer components."
            )
        floor = 1e-3 * float(features_ND.var()) or 1e-6  # of a variance, or a dead feature makes it infinite
        solver = Solver(components, covariance_type="diag", reg_covar=floor, random_state=self.seed, max_iter=500)
        centre_D = features_ND.mean(axis=0)  # the solver expands squares, which cancel far from the origin
        solver.fit(features_ND - centre_D)
        self.share_K_, self.mean_KD_, self.variance_KD_ = solver.weights_, solver.means_ + centre_D, solver.covariances_

    def _score(self, features_ND: Floats) -> Floats:
        pairs = zip(self.mean_KD_, self.variance_KD_, strict=True)
        distance_NK = np.stack([(np.square(features_ND - m_D) / v_D).sum(axis=1) for m_D, v_D in pairs], axis=1)
        log_density_NK = -0.5 * (distance_NK + np.log(2 * np.pi * self.variance_KD_).sum(axis=1))
        return -logsumexp(np.log(self.share_K_) + log_density_NK, axis=1)

    def torch_constants(self) -> dict[str, NDArray[Any]]:
        log_share_K = np.log(self.share_K_) - 0.5 * np.log(2 * np.pi * self.variance_KD_).sum(axis=1)
        return {"mean_KD": self.mean_KD_, "root_KD": self.variance_KD_**-0.5, "log_share_K": log_share_K}

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        scaled_BKD = (features_BD[:, None] - constants["mean_KD"]) * constants["root_KD"]
        return -(constants["log_share_K"] - 0.5 * scaled_BKD.square().sum(dim=2)).logsumexp(dim=1)
