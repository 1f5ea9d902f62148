"""Kernel null Foley-Sammon transform (Bodesheim et al., CVPR 2013) and its local form (WACV 2015).

In the null space of the within-class scatter each training class is a single point; novelty is the distance to the
nearest. The null space needs no eigenvectors: with class indicators Y (n x C) its directions are sum_i a_i phi(x_i)
with a = K^-1 Y b, their length is b' M b with M = Y' K^-1 Y, and that the coefficients add up to 0 (centring) means
1' M b = 0. A picture is projected to B' Y' K^-1 k(x), a training image of class c to row c of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh, null_space
from scipy.spatial.distance import cdist

from bigtrain.detectors.feature_detector import FeatureDetector, Floats, Ints, class_means, unit_rows
from bigtrain.detectors.feature_module import squared_distances, unit

if TYPE_CHECKING:
    from torch import Tensor

Kernel = Literal["intersection", "rbf"]
MAX_IMAGES = 20_000  # of an exact fit, which then holds 3 x 3.2 GB
MAX_LOCAL_IMAGES = 35_000  # of a local one, which holds as much
MAX_GRAPH_BYTES = 64 << 20  # of an exported graph, for each picture
COLLAPSED = 1e-6  # how far a training image may be from its class, whose distance to others is of order 1
SMALLEST_EIGENVALUE = 1e-12


def null_space_of(kernel_NN: Floats, class_N: Ints) -> tuple[Floats, Floats]:
    """The null space of some training images, from the kernel between them: what takes kernel values to coordinates,
    u(x) = k(x) to_null_NJ, and where each class lies, point_CJ. J = C - 1 dimensions, of one class 1.

    With one class the origin of the kernel's space is the other (Bodesheim 3.3).
    """
    classes = int(class_N.max()) + 1
    indicator_NC = np.eye(classes)[class_N]
    try:
        solved_NC = cho_solve(cho_factor(kernel_NN), indicator_NC)
    except LinAlgError:
        solved_NC = np.full_like(indicator_NC, np.nan)
    tied = np.zeros((classes, classes))
    if not np.abs(kernel_NN @ solved_NC - indicator_NC).max() < COLLAPSED:  # images that are equal, or nearly
        value_R, vector_NR = eigh(kernel_NN)
        kept = value_R > SMALLEST_EIGENVALUE * value_R[-1]
        value_R, vector_NR = value_R[kept], vector_NR[:, kept]
        solved_NC = vector_NR @ ((vector_NR.T @ indicator_NC) / value_R[:, None])
        outside_NC = indicator_NC - kernel_NN @ solved_NC
        tied = outside_NC.T @ outside_NC
    # of indicators of length 1, so that rounding, which is far below COLLAPSED, ties nothing
    length_C = np.sqrt(np.bincount(class_N))
    value_C, vector_CC = eigh(tied / np.outer(length_C, length_C))
    free_CF = vector_CC[:, value_C < COLLAPSED] / length_C[:, None] if tied.any() else np.eye(classes)
    length_CC = indicator_NC.T @ solved_NC
    root_FF = np.linalg.cholesky(free_CF.T @ length_CC @ free_CF) if free_CF.size else free_CF.T
    basis_CJ = np.linalg.solve(root_FF, free_CF.T).T  # orthonormal in the kernel's space
    if classes > 1 and basis_CJ.size:
        centring_J = basis_CJ.T @ length_CC.sum(axis=1)
        basis_CJ = basis_CJ @ null_space(centring_J[None])
    if basis_CJ.shape[1] == 0:
        raise ValueError(
            "these classes have no null space: each has images whose features equal those of another. Look at the "
            "layer they are taken from, and for pictures that are in two classes."
        )
    return solved_NC @ basis_CJ, basis_CJ


class _OnKernel(FeatureDetector):
    def __init__(self, kernel: Kernel = "intersection") -> None:
        self.kernel = kernel

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        self._check_sign(features_ND)
        self.gamma_ = float(1 / (unit_rows(features_ND).var() * features_ND.shape[1] or 1.0))

    def _check_sign(self, features_ND: Floats) -> None:
        if self.kernel == "intersection" and (negative := int((features_ND < 0).any(axis=1).sum())):
            raise ValueError(
                f"{negative} of {len(features_ND)} images have negative features, and histograms, whose intersection "
                "is the kernel, have none: take a layer behind a ReLU, or kernel='rbf'."
            )

    def _kernel(self, left_ND: Floats, right_MD: Floats) -> Floats:
        """k(x, x) = 1: the intersection of histograms of sum 1, sum_d min(x_d, y_d), or RBF on rows of length 1."""
        if self.kernel == "intersection":
            self._check_sign(left_ND)
            return 1 - cdist(unit_rows(left_ND, 1), unit_rows(right_MD, 1), "cityblock") / 2
        return np.exp(-self.gamma_ * cdist(unit_rows(left_ND), unit_rows(right_MD), "sqeuclidean"))


class KNFST(_OnKernel):
    """Novelty = distance to the nearest class point in the null space. One class is enough: the origin is the other.

    Exact, it holds three n x n float64 (24 n^2 bytes) and takes n^3 / 3 operations, once. With landmarks the kernel is
    Nystroem's, of so many training images (8 n m bytes, n m^2 operations): its null space is empty, and the C - 1
    directions with the smallest within-class share of the scatter take its place; with all images the same space.

    Args:
        kernel: "intersection" for features without negative values, or "rbf".
        landmarks: 0: exact.
        seed: of the choice of landmarks.
    """

    def __init__(self, kernel: Kernel = "intersection", landmarks: int = 0, seed: int = 0) -> None:
        super().__init__(kernel)
        self.landmarks, self.seed = landmarks, seed

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        super()._fit(features_ND, class_N)
        if not self.landmarks:
            if len(features_ND) > MAX_IMAGES:
                raise ValueError(
                    f"KNFST on {len(features_ND)} images holds {24 * len(features_ND) ** 2 / 1e9:.0f} GB: give "
                    "landmarks, such as 3000, or fewer images."
                )
            self.known_ND_ = features_ND
            self.to_null_NJ_, self.point_CJ_ = null_space_of(self._kernel(features_ND, features_ND), class_N)
            return
        if len(self.classes_) < 2:
            raise ValueError("KNFST with landmarks needs at least 2 known classes; for one, leave landmarks out.")
        chosen = np.random.default_rng(self.seed).permutation(len(features_ND))[: self.landmarks]
        self.known_ND_ = features_ND[np.sort(chosen)]
        value_M, vector_MM = eigh(self._kernel(self.known_ND_, self.known_ND_))
        kept = value_M > SMALLEST_EIGENVALUE * value_M[-1]
        root_MR = vector_MM[:, kept] / np.sqrt(value_M[kept])
        mapped_NR = self._kernel(features_ND, self.known_ND_) @ root_MR
        _, length_R, axes_RR = np.linalg.svd(mapped_NR - mapped_NR.mean(axis=0), full_matrices=False)
        whitening_RR = (axes_RR / length_R[:, None])[length_R > 1e-6 * length_R[0]].T
        centred_CR = class_means(mapped_NR, class_N) - mapped_NR.mean(axis=0)
        between_CR = np.sqrt(np.bincount(class_N))[:, None] * (centred_CR @ whitening_RR)
        directions_RJ = np.linalg.svd(between_CR, full_matrices=False)[2][: len(self.classes_) - 1].T
        orthonormal_RJ, _ = np.linalg.qr(whitening_RR @ directions_RJ)
        self.to_null_NJ_ = root_MR @ orthonormal_RJ
        self.point_CJ_ = class_means(mapped_NR @ orthonormal_RJ, class_N)

    def torch_constants(self) -> dict[str, NDArray[Any]]:
        of_a_picture = 8 * self.known_ND_.size
        if self.kernel == "intersection" and of_a_picture > MAX_GRAPH_BYTES:
            raise ValueError(
                f"KNFST's intersection kernel with {len(self.known_ND_)} training images takes "
                f"{of_a_picture / 1e6:.0f} MB a picture in a graph: fit it with --landmarks, or take another detector."
            )
        norm = 1 if self.kernel == "intersection" else 2
        known_MD = unit_rows(self.known_ND_, norm)
        return {"known_MD": known_MD, "to_null_MJ": self.to_null_NJ_, "point_CJ": self.point_CJ_}

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        known_MD = constants["known_MD"]
        if self.kernel == "intersection":
            difference_BMD = unit(features_BD, 1)[:, None] - known_MD
            kernel_BM = 1 - difference_BMD.abs().sum(dim=2) / 2
        else:
            kernel_BM = (-self.gamma_ * squared_distances(unit(features_BD), known_MD)).exp()
        projected_BJ = kernel_BM @ constants["to_null_MJ"]
        return (projected_BJ[:, None] - constants["point_CJ"]).square().sum(dim=2).amin(dim=1).sqrt()

    def _score(self, features_ND: Floats) -> Floats:
        projected_NJ = self._kernel(features_ND, self.known_ND_) @ self.to_null_NJ_
        return cdist(projected_NJ, self.point_CJ_).min(axis=1)


class LocalKNFST(_OnKernel):
    """KNFST on the training images nearest to each image that is scored, by kernel (Bodesheim et al., WACV 2015).

    Each image scored costs k^3 / 3 operations; the kernel between the training images is held (8 n^2 bytes), of at
    most MAX_LOCAL_IMAGES.

    Args:
        neighbours: k; 600 in Perera & Patel. As many as there are training images is KNFST.
    """

    def __init__(self, kernel: Kernel = "intersection", neighbours: int = 600) -> None:
        super().__init__(kernel)
        self.neighbours = neighbours

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        super()._fit(features_ND, class_N)
        if len(features_ND) > MAX_LOCAL_IMAGES:
            raise ValueError(
                f"local KNFST on {len(features_ND)} images holds {8 * len(features_ND) ** 2 / 1e9:.0f} GB: give at "
                f"most {MAX_LOCAL_IMAGES}, or take another detector, such as KNFST with landmarks."
            )
        self.known_ND_, self.class_N_ = features_ND, class_N
        self.kernel_NN_ = self._kernel(features_ND, features_ND)

    def torch_constants(self) -> dict[str, NDArray[Any]]:
        raise ValueError(
            "local KNFST solves an eigenproblem of its own for each picture, which no graph holds: export KNFST, or "
            "score with bigtrain."
        )

    def _score(self, features_ND: Floats) -> Floats:
        kernel_BN = self._kernel(features_ND, self.known_ND_)
        nearest_BK = np.argsort(-kernel_BN, axis=1, kind="stable")[:, : self.neighbours]
        score_B = np.empty(len(features_ND))
        for row, near_K in enumerate(np.sort(nearest_BK, axis=1)):
            _, class_K = np.unique(self.class_N_[near_K], return_inverse=True)
            to_null_KJ, point_CJ = null_space_of(self.kernel_NN_[np.ix_(near_K, near_K)], class_K)
            score_B[row] = cdist((kernel_BN[row, near_K] @ to_null_KJ)[None], point_CJ).min()
        return score_B
