"""Detectors: what is saved, loaded and scores images; novelty, higher = more novel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtrain.detectors.saved import ImageDetector

DETECTOR_FILE = "detector.json"


def load_detector(path: str | Path, *, device: str | None = None) -> ImageDetector:
    """Load the detector saved in a folder (RUN/detector), onto a GPU if there is one and no `device` is named.

    Raises:
        ValueError: the folder holds no detector, or one of a method this bigtrain lacks.
    """
    from bigtrain.detectors.distillation import DistillationDetector
    from bigtrain.detectors.network import NetworkDetector

    kinds: dict[str, type[ImageDetector]] = {kind.method: kind for kind in (DistillationDetector, NetworkDetector)}
    file = Path(path) / DETECTOR_FILE
    if not file.is_file():
        raise ValueError(f"{path} holds no {DETECTOR_FILE}: give the folder `detector` of a finished run.")
    method = json.loads(file.read_text()).get("method")
    if method not in kinds:
        raise ValueError(f"{file} is of method {method!r}; this bigtrain loads {', '.join(kinds)}.")
    return kinds[method].load(Path(path), device=device)
