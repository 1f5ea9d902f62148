"""Extreme value signatures: Schultheiss et al., "Finding the Unknown", GCPR 2017; K-extremes in Perera & Patel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.choices import Overlap
from bigtrain.detectors.feature_detector import FeatureDetector, Floats, Ints, class_means
from bigtrain.detectors.feature_module import unit
from bigtrain.methods.signatures.equations import signature_cosine_novelty, signature_novelty, strongest


class Signatures(FeatureDetector):
    """A class is the set of feature dimensions with the largest mean activations; novelty = 1 - the best overlap.

    Args:
        share: of the dimensions that make a signature; 10 % in the paper, of fc7 of a VGG16.
        overlap: "share": of the signature's dimensions, how many are among the image's own strongest; "weighted": the
            same, each dimension weighing as its mean activation (negative ones nothing); "cosine" between the image's
            features and the signature. See `signature_novelty`.
    """

    def __init__(self, share: float = 0.1, overlap: Overlap = "share") -> None:
        if not 0 < share < 1:
            raise ValueError(f"a signature's share of the dimensions is {share}; it must lie between 0 and 1.")
        self.share, self.overlap = share, overlap

    def _fit(self, features_ND: Floats, class_N: Ints) -> None:
        self.from_means(class_means(features_ND, class_N))

    def from_means(self, mean_CD: Floats, classes: Floats | list[str] | None = None) -> Signatures:
        """Fit from what one pass over the images has added up: the mean feature of each class."""
        if classes is not None:
            self.classes_ = np.asarray(classes)
        self.width_ = mean_CD.shape[1]
        self.count_ = max(1, round(self.share * self.width_))
        self.mean_CD_ = mean_CD.astype(np.float32)
        mean = torch.from_numpy(self.mean_CD_)
        signature_CD = strongest(mean, self.count_)
        if self.overlap == "weighted":
            signature_CD = signature_CD * mean.clamp(min=0)
        total_C1 = signature_CD.sum(dim=1, keepdim=True)
        self.signature_CD_ = (signature_CD / torch.where(total_C1 > 0, total_C1, 1)).numpy()
        return self

    def torch_constants(self) -> dict[str, NDArray[Any]]:
        return {"signature_CD": self.signature_CD_}

    def score_torch(self, features_BD: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        """As `_score`, (B, D) to (B,)."""
        signature_CD = constants["signature_CD"]
        if self.overlap == "cosine":
            return 1 - (unit(features_BD) @ unit(signature_CD.double()).T).amax(dim=1)
        return signature_novelty(features_BD.float(), signature_CD, self.count_).double()

    def _score(self, features_ND: Floats) -> Floats:
        features, signature_CD = torch.from_numpy(features_ND.astype(np.float32)), torch.from_numpy(self.signature_CD_)
        if self.overlap == "cosine":
            return signature_cosine_novelty(features, signature_CD).double().numpy()
        return signature_novelty(features, signature_CD, self.count_).double().numpy()
