"""The base of every saved detector: pictures in, scores out, a threshold, a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bigtrain.choices import Chosen
from bigtrain.data.decode import Picture
from bigtrain.data.views import Transform
from bigtrain.files import whole_folder, write_json
from bigtrain.models.attention import torch_dtype

Given = Image.Image | NDArray[np.uint8] | str | Path  # a picture, open or in a file


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a detector turns a picture into a score; kept in detector.json."""

    image_size: int
    precision: Chosen
    batch: int
    """Images a forward pass. Short batches are filled up: a kernel's rounding can depend on the batch's shape."""
    threshold: float | None = None
    """Score above which `threshold_quantile` of the held-out known training images do not lie."""
    threshold_quantile: float | None = None


class Scored(NamedTuple):
    """A batch's scores, float; per patch too where the method has a map, and the class where it knows one."""

    score_B: Tensor
    map_Bhw: Tensor | None = None
    class_B: Tensor | None = None


class ImageDetector:
    """Novelty of pictures. A subclass has `method`, `view`, `score_tensor`, `_write` and `load`.

    Callers test for optional abilities, not for method names: `score_map` (patch by patch), `Scored.class_B` (the
    class shown), `target` and `constant_score` (a prediction, and what predicting the mean would score).
    """

    method: ClassVar[str]
    scoring: Any

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def view(self) -> Transform:
        """What is made of a picture before it is scored."""
        raise NotImplementedError

    def score_tensor(self, image_B3HW: Tensor) -> Scored:
        """Score uint8 views on the detector's device."""
        raise NotImplementedError

    def score_map(self, images: Iterable[Given]) -> NDArray[np.float32] | None:
        """Novelty of each patch of each image, (B, h, w); None where the method has none."""
        return None

    def target(self, image_B3HW: Tensor) -> Tensor:
        """What a detector that scores by errors of a prediction predicts, float32 (B, ...), of uint8 views."""
        raise NotImplementedError

    def constant_score(self, image_B3HW: Tensor, constant: Tensor) -> Tensor:
        """The score (B,) of a predictor that ignores the image and always answers `constant`, (...)."""
        raise NotImplementedError

    def _write(self, folder: Path) -> dict[str, Any]:
        """Write the tensors, and return what detector.json is to say of the method beside the scoring."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, *, device: str | None = None) -> Self:
        raise NotImplementedError

    def score(self, images: Iterable[Given]) -> NDArray[np.float64]:
        """Novelty of each image, higher = more novel: shape (B,)."""
        parts = [found.score_B.double().cpu().numpy() for found in self._score(images)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _score(self, images: Iterable[Given]) -> Iterator[Scored]:
        view = self.view()
        rest = iter(images)
        while some := list(islice(rest, self.scoring.batch)):
            views = np.stack([view(_open(image), np.random.default_rng(0))["image"] for image in some])
            image_B3HW = torch.zeros(self.scoring.batch, *views.shape[1:], dtype=torch.uint8)
            image_B3HW[: len(views)] = torch.from_numpy(views)
            found = self.score_tensor(image_B3HW.to(self.device))
            yield Scored(*(None if part is None else part[: len(views)] for part in found))  # type: ignore[arg-type]

    def autocast(self) -> torch.autocast:
        precision = self.scoring.precision
        return torch.autocast(self.device.type, torch_dtype(precision), enabled=precision != "fp32")

    def calibrate(self, known_score_N: NDArray[np.floating], quantile: float = 0.95) -> float | None:
        """Set the threshold to a score that `quantile` of held-out known images do not exceed; None without images."""
        threshold = calibrated(known_score_N, quantile)
        if threshold is not None:
            self.scoring = replace(self.scoring, threshold=threshold, threshold_quantile=quantile)
        return threshold

    def save(self, folder: Path) -> None:
        """Write detector.json and .safetensors files; the folder appears whole, under its name, at the end."""
        with whole_folder(folder) as unfinished:
            record = {"method": self.method, "version": 1, **asdict(self.scoring), **self._write(unfinished)}
            write_json(unfinished / "detector.json", record)


def calibrated(known_score_N: NDArray[np.floating], quantile: float) -> float | None:
    """A score that `quantile` of held-out known images do not exceed; None without images."""
    return float(np.quantile(known_score_N, quantile, method="higher")) if len(known_score_N) else None


def read_record(folder: Path) -> dict[str, Any]:
    """What detector.json says, without method and version."""
    record = json.loads((folder / "detector.json").read_text())
    return {key: value for key, value in record.items() if key not in ("method", "version")}


def chosen_device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _open(image: Given) -> Picture:
    return Picture(Path(image).read_bytes()) if isinstance(image, str | Path) else Picture.of(image)
