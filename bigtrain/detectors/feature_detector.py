"""The contract of detectors on features: scikit-learn's conventions, novelty scores higher for the more novel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class FeatureDetector:
    """`fit(features_ND, class_N)`, then `score(features_ND)`: float64 (N,), raw, higher = more novel.

    What the constructor is given keeps its name; what `fit` learns ends in `_`, and is numbers and arrays alone, so
    that it can be saved. A subclass has `_fit` and `_score`, which get checked arrays: float64 features, and classes as
    0 .. C-1.
    """

    fewest_classes: ClassVar[int] = 1
    width_: int
    classes_: NDArray[Any]

    def fit(self, features_ND: ArrayLike, class_N: ArrayLike | None = None) -> Self:
        """Learn the known classes.

        Args:
            features_ND: of N known images.
            class_N: the class of each, numbers or names; None: all are of one class.

        Raises:
            ValueError: no images, NaN or infinite features, lengths that differ, or too few classes for this method.
        """
        features_ND = checked(features_ND)
        if len(features_ND) == 0:
            raise ValueError(f"no known images were given to {self.name}; at least one is needed.")
        classes = np.zeros(len(features_ND), np.int64) if class_N is None else np.asarray(class_N)
        if classes.shape != (len(features_ND),):
            raise ValueError(f"there are features of {len(features_ND)} images, and classes of shape {classes.shape}.")
        self.classes_, number_N = np.unique(classes, return_inverse=True)
        if len(self.classes_) < self.fewest_classes:
            raise ValueError(
                f"{self.name} tells known classes apart and needs at least {self.fewest_classes}; "
                f"{len(self.classes_)} was given. Name more known classes, or take a method for one."
            )
        self.width_ = features_ND.shape[1]
        self._fit(features_ND, number_N.astype(np.int64))
        return self

    def score(self, features_ND: ArrayLike) -> Floats:
        """Novelty of each image.

        Raises:
            ValueError: not fitted, NaN or infinite features, or of another length than those fitted.
        """
        if not hasattr(self, "width_"):
            raise ValueError(f"{self.name} is not fitted: call fit(features, classes) first.")
        features_ND = checked(features_ND)
        if features_ND.shape[1] != self.width_:
            raise ValueError(
                f"{self.name} was fitted to {self.width_} features an image, and {features_ND.shape[1]} were given: "
                "take the same layer of the same network."
            )
        return self._score(features_ND) if len(features_ND) else np.zeros(0)

    @property
    def name(self) -> str:
        return type(self).__name__

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        """Learn from checked features; nothing where only the number of classes counts."""

    def _score(self, features_ND: Floats) -> Floats:
        raise NotImplementedError

    def torch_constants(self) -> dict[str, NDArray[Any]]:
        """The arrays that `score_torch` needs: those that were learned, unless a method prepares its own.

        Raises:
            ValueError: the score cannot be written as a graph; it says why.
        """
        return {name: value for name, value in vars(self).items() if name.endswith("_") and is_numbers(value)}

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        """The same score in torch, (B,), of float64 features (B, D) and `torch_constants`: for exported graphs."""
        raise ValueError(f"{self.name} has no form in torch.")


def is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def checked(features_ND: ArrayLike) -> Floats:
    """Features as float64 (N, D); what is not finite has no place among them."""
    try:
        features = np.asarray(features_ND, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"features are numbers, a row for each image, and these are not ({error}).") from error
    if features.ndim != 2:
        raise ValueError(f"features have the shape {features.shape}; a row for each image is needed: (N, D).")
    if bad := int((~np.isfinite(features)).any(axis=1).sum()):
        first = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise ValueError(
            f"the features of {bad} of {len(features)} images are NaN or infinite, the first in row {first}: look for "
            "an overflow in the network (--precision fp32), or for broken weights."
        )
    return features


def unit_rows(features_ND: Floats, norm: int = 2) -> Floats:
    """Rows of length 1 in the given norm; one of zeros stays so."""
    length_N1 = np.linalg.norm(features_ND, ord=norm, axis=1, keepdims=True)
    return features_ND / np.where(length_N1 > 0, length_N1, 1)


def class_means(features_ND: Floats, class_N: Ints) -> Floats:
    """The mean feature of each class 0 .. C-1: (C, D)."""
    count_C = np.bincount(class_N)
    order_N = np.argsort(class_N, kind="stable")
    first_C = np.cumsum(count_C) - count_C
    return np.add.reduceat(features_ND[order_N], first_C, axis=0) / count_C[:, None]
