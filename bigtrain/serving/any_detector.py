"""A detector by its path: a run's, a folder's, one of the hub, or an exported model."""

from __future__ import annotations

from pathlib import Path

from bigtrain.detectors import detector_folder
from bigtrain.detectors.picture_judge import PictureJudge

EXPORTED = (".onnx", ".xml", ".pt2")


def file_of(path: str) -> Path:
    """The exported model, or the folder with detector.json, that a path stands for. Raises ValueError."""
    if Path(path).suffix in EXPORTED:
        if not Path(path).is_file():
            raise ValueError(f"--detector {path} does not exist: give a finished run, a detector's folder, or a model.")
        return Path(path)
    return detector_folder(path)


def any_detector(path: str, device: str | None = None, local_rank: int = 0, world_size: int = 1) -> PictureJudge:
    """Load it, onto this process's GPU if there are GPUs and no device is named.

    Raises:
        ValueError: there is none, or it cannot be used here.
    """
    file = file_of(path)
    if file.is_file() and file.suffix != ".pt2":
        from bigtrain.serving.exported import ExportedDetector

        if device is None and world_size > 1:
            device = f"cuda:{local_rank}"  # where its runtime has GPUs
        return ExportedDetector.load(file, device=device)
    import torch

    from bigtrain.detectors import load_detector
    from bigtrain.runtime.launch import threads_of_process

    torch.set_num_threads(threads_of_process())
    if file.is_file():
        from bigtrain.serving.exported import ExportedDetector

        return ExportedDetector.load(file, device=device)
    if device is None and world_size > 1 and torch.cuda.is_available():
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
    return load_detector(file, device=device)
