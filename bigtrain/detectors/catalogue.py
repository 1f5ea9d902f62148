"""The classical detectors by name, imported when they are used: most need scikit-learn or scipy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtrain.detectors.contract import FeatureDetector

ON_FEATURES = {  # name -> module and class
    "nearest neighbours": "neighbours.NearestNeighbours",
    "one-class SVM": "one_class.OneClassSVM",
    "SVDD": "one_class.SVDD",
    "KNFST": "knfst.KNFST",
    "local KNFST": "knfst.LocalKNFST",
    "K-extremes": "signatures.Signatures",
    "Mahalanobis": "gaussian.Mahalanobis",
    "Gaussian mixture": "gaussian.GaussianMixture",
}
ON_LOGITS = {"max logit": "logits.MaxLogit", "max softmax": "logits.MaxSoftmax", "OpenMax": "openmax.OpenMax"}
EVERY = ON_FEATURES | ON_LOGITS


def detector_class(name: str) -> type[FeatureDetector]:
    module, _, kind = EVERY[name].partition(".")
    return getattr(import_module(f"{__package__}.{module}"), kind)


def name_of(detector: FeatureDetector) -> str:
    """The name of a detector's class here."""
    kind = type(detector)
    return next(
        name for name, place in EVERY.items() if f"{__package__}.{place}" == f"{kind.__module__}.{kind.__name__}"
    )
