"""Detectors: what is saved, loaded and scores images; novelty, higher = more novel."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtrain.detectors.image_detector import ImageDetector

DETECTOR_FILE = "detector.json"
KINDS = {  # its `method` -> a class, imported when it is used
    "defend": "bigtrain.methods.defend.detector.DistillationDetector",
    "network": "bigtrain.detectors.network_detector.NetworkDetector",
}


def load_detector(path: str | Path, *, device: str | None = None) -> ImageDetector:
    """Load the detector saved in a folder (RUN/detector), onto a GPU if there is one and no `device` is named.

    Raises:
        ValueError: the folder holds no detector, or one of a method or version this bigtrain lacks.
    """
    from bigtrain.detectors.image_detector import read_record

    method = read_record(Path(path)).get("method")
    if method not in KINDS:
        raise ValueError(f"{path}/{DETECTOR_FILE} is of method {method!r}; this bigtrain loads {', '.join(KINDS)}.")
    module, _, name = KINDS[method].rpartition(".")
    kind: type[ImageDetector] = getattr(import_module(module), name)
    return kind.load(Path(path), device=device)
