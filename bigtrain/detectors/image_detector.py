"""The base of every saved detector: pictures in, scores out, a threshold, a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import bigtrain
from bigtrain.choices import Chosen
from bigtrain.detectors import DETECTOR_FILE
from bigtrain.detectors.calibration import Calibration
from bigtrain.detectors.picture_judge import PictureJudge, ScoredViews
from bigtrain.detectors.pictures import Given, Unreadable, batches_of
from bigtrain.detectors.record import VERSION, check_files, read_record, sha256_of
from bigtrain.files import whole_folder, write_json
from bigtrain.models.attention import torch_dtype

if TYPE_CHECKING:
    from bigtrain.detectors.scoring_module import ScoringModule

log = logging.getLogger(__name__)
READ = "upright 8-bit RGB; a JPEG decoded at 1/2, 1/4 or 1/8 where thrice the view is left; bicubic, anti-aliased"


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


class ImageDetector(PictureJudge):
    """Novelty of pictures. A subclass has `method`, `view`, `score_tensor`, `_write` and `_load`.

    Callers test for optional abilities, not for method names: `score_map` (patch by patch), `Scored.class_B` (the
    class shown), `target` and `constant_score` (a prediction, and what predicting the mean would score).
    """

    method: ClassVar[str]

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def score_tensor(self, image_B3HW: Tensor) -> Scored:
        """Score uint8 views on the detector's device."""
        raise NotImplementedError

    def target(self, image_B3HW: Tensor) -> Tensor:
        """What a detector that scores by errors of a prediction predicts, float32 (B, ...), of uint8 views."""
        raise NotImplementedError

    def constant_score(self, image_B3HW: Tensor, constant: Tensor) -> Tensor:
        """The score (B,) of a predictor that ignores the image and always answers `constant`, (...)."""
        raise NotImplementedError

    def constant_map(self, image_B3HW: Tensor, constant: Tensor) -> Tensor:
        """The map (B, h, w) of such a predictor, where the method has maps."""
        raise NotImplementedError

    def maps_by(self, function: Callable[[Tensor], Tensor], images: Iterable[Given]) -> NDArray[np.float32]:
        """The maps (B, h, w) that a function of uint8 views on the device gives; NaN of what cannot be read."""
        maps = []
        for image_B3HW, is_read_b in self.batches(images):
            maps.append(np.full((len(is_read_b), self.map_side or 0, self.map_side or 0), np.nan, np.float32))
            if image_B3HW is not None:
                maps[-1][is_read_b] = function(image_B3HW)[: is_read_b.sum()].float().cpu().numpy()
        return np.concatenate(maps)

    def _write(self, folder: Path) -> dict[str, Any]:
        """Write the tensors, and return what detector.json is to say of the method beside the scoring."""
        raise NotImplementedError

    @classmethod
    def _load(cls, folder: Path, *, device: str | None = None) -> Self:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, *, device: str | None = None) -> Self:
        """Raises ValueError: what the folder holds is not what was saved."""
        record = read_record(folder)
        check_files(folder, record)
        detector = cls._load(folder, device=device)
        try:
            detector.calibration = Calibration.from_record(record.get("calibration"))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{folder / DETECTOR_FILE} has no calibration that can be read ({error}): copy the detector again."
            ) from error
        return detector

    def score_views(self, image_B3HW: NDArray[np.uint8]) -> ScoredViews:
        found = self._fitting(torch.from_numpy(image_B3HW).to(self.device))
        return ScoredViews(
            found.score_B.double().cpu().numpy(),
            None if found.map_Bhw is None else found.map_Bhw.float().cpu().numpy(),
            None if found.class_B is None else found.class_B.cpu().numpy(),
        )

    def _fitting(self, image_B3HW: Tensor) -> Scored:
        """`score_tensor`, in halves where a GPU's memory is too small for the batch."""
        try:
            return self.score_tensor(image_B3HW)
        except torch.OutOfMemoryError:
            if len(image_B3HW) == 1:
                raise
        log.warning(
            "%d pictures at once do not fit the GPU's memory: they are scored in halves, and the last digits of scores "
            "may differ from the run's.",
            len(image_B3HW),
        )
        torch.cuda.empty_cache()
        halves = zip(*(self._fitting(half) for half in image_B3HW.tensor_split(2)), strict=True)
        return Scored(*(None if parts[0] is None else torch.cat(parts) for parts in halves))  # type: ignore[arg-type]

    def batches(
        self, images: Iterable[Given], unreadable: Unreadable = "nan"
    ) -> Iterator[tuple[Tensor | None, NDArray[np.bool_]]]:
        """As `batches_of`, on the detector's device."""
        for image_B3HW, is_read_b in batches_of(images, self.view(), self.scoring.batch, unreadable):
            yield None if image_B3HW is None else torch.from_numpy(image_B3HW).to(self.device), is_read_b

    def autocast(self) -> torch.autocast:
        precision = self.scoring.precision
        return torch.autocast(self.device.type, torch_dtype(precision), enabled=precision != "fp32")

    def as_module(self) -> ScoringModule:
        """This detector as a torch module: uint8 images of its size to (score, map)."""
        from bigtrain.detectors.scoring_module import ScoringModule

        return ScoringModule(self)

    def calibrate(
        self,
        known_score_N: NDArray[np.floating],
        quantile: float = 0.95,
        pictures: str = "held-out known images of the run",
    ) -> float | None:
        """Keep the scores of held-out known images, for p-values, and set the threshold to a score that `quantile` of
        them do not exceed; None without images."""
        threshold = calibrated(known_score_N, quantile)
        if threshold is not None:
            self.scoring = replace(self.scoring, threshold=threshold, threshold_quantile=quantile)
            self.calibration = Calibration.of(known_score_N, pictures)
        return threshold

    def save(self, folder: Path, **how: Any) -> None:
        """Write detector.json and .safetensors files; the folder appears whole, under its name, at the end.

        Args:
            how: what the method's `_write` takes beside the folder.
        """
        with whole_folder(folder) as unfinished:
            further = self._write(unfinished, **how)
            record = {
                "method": self.method,
                "version": VERSION,
                "bigtrain": bigtrain.__version__,
                **asdict(self.scoring),
                **further,
                "pictures": f"{READ}; {self.view()}",
                "calibration": self.calibration.record() if len(self.calibration) else None,
                "files": {file.name: sha256_of(file) for file in sorted(unfinished.iterdir())},
            }
            write_json(unfinished / DETECTOR_FILE, record)


def calibrated(known_score_N: NDArray[np.floating], quantile: float) -> float | None:
    """A score that `quantile` of held-out known images do not exceed; None without images."""
    return float(np.quantile(known_score_N, quantile, method="higher")) if len(known_score_N) else None


def chosen_device(device: str | None) -> torch.device:
    """Raises ValueError: this machine has no such device."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not available here: give cpu, cuda or cuda:0 ...") from error
    return chosen
