"""Detectors: what is saved, loaded and scores images; novelty, higher = more novel."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigtrain.detectors.image_detector import ImageDetector

DETECTOR_FILE = "detector.json"
HUB_PREFIX = "hf://"
KINDS = {  # its `method` -> a class, imported when it is used
    "defend": "bigtrain.methods.defend.detector.DistillationDetector",
    "network": "bigtrain.detectors.network_detector.NetworkDetector",
}


def load_detector(path: str | Path, *, device: str | None = None) -> ImageDetector:
    """Load a saved detector, onto a GPU if there is one and no `device` is named.

    Args:
        path: a run, a detector's folder (RUN/detector), or hf://user/name[@revision] on Hugging Face's hub.

    Raises:
        ValueError: there is no detector, several, or one of a method or version this bigtrain lacks; a file of it is
            missing or not the one that was saved.
    """
    from bigtrain.detectors.record import read_record

    folder = detector_folder(path)
    method = read_record(folder).get("method")
    if method not in KINDS:
        raise ValueError(f"{folder}/{DETECTOR_FILE} is of method {method!r}; this bigtrain loads {', '.join(KINDS)}.")
    module, _, name = KINDS[method].rpartition(".")
    kind: type[ImageDetector] = getattr(import_module(module), name)
    return kind.load(folder, device=device)


def detector_folder(path: str | Path) -> Path:
    """The folder with detector.json that a run, a folder or an address stands for.

    Raises:
        ValueError: there is none, or there are several, with their names.
    """
    if str(path).startswith(HUB_PREFIX):
        from bigtrain.models.hub import downloaded_detector

        return downloaded_detector(str(path).removeprefix(HUB_PREFIX))
    folder = Path(path)
    if (folder / DETECTOR_FILE).exists():
        return folder
    if (folder / "detector" / DETECTOR_FILE).exists():
        return folder / "detector"
    several = sorted(file.parent for file in folder.glob(f"detectors/*/{DETECTOR_FILE}"))
    if len(several) == 1:
        return several[0]
    if several:
        names = ", ".join(each.name for each in several)
        raise ValueError(f"{folder} holds {len(several)} detectors ({names}): name one, such as {several[0]}.")
    what = "does not exist" if not folder.exists() else f"holds no {DETECTOR_FILE}"
    raise ValueError(f"{folder} {what}: give the folder of a finished run, or `detector` in it.")
