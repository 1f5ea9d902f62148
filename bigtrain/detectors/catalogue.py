"""Detectors on features and on logits by name, imported when they are used: most need scikit-learn or SciPy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtrain.detectors.feature_detector import FeatureDetector

CLASSICAL, METHODS = "bigtrain.detectors.classical", "bigtrain.methods"
ON_FEATURES = {  # name -> module and class
    "nearest neighbours": f"{CLASSICAL}.nearest.NearestNeighbours",
    "one-class SVM": f"{CLASSICAL}.one_class.OneClassSVM",
    "SVDD": f"{CLASSICAL}.one_class.SVDD",
    "KNFST": f"{CLASSICAL}.knfst.KNFST",
    "local KNFST": f"{CLASSICAL}.knfst.LocalKNFST",
    "K-extremes": f"{METHODS}.signatures.detector.Signatures",
    "Mahalanobis": f"{CLASSICAL}.gaussian.Mahalanobis",
    "Gaussian mixture": f"{CLASSICAL}.gaussian.GaussianMixture",
}
ON_LOGITS = {
    "max logit": f"{CLASSICAL}.logits.MaxLogit",
    "max softmax": f"{CLASSICAL}.logits.MaxSoftmax",
    "OpenMax": f"{CLASSICAL}.openmax.OpenMax",
}
EVERY = ON_FEATURES | ON_LOGITS
EVERY_ROW = "all"  # of a table, where rows are named


def detector_class(name: str) -> type[FeatureDetector]:
    module, _, kind = EVERY[name].rpartition(".")
    return getattr(import_module(module), kind)


def name_of(detector: FeatureDetector) -> str:
    """The name of a detector's class here."""
    kind = type(detector)
    return next(name for name, place in EVERY.items() if place == f"{kind.__module__}.{kind.__name__}")
