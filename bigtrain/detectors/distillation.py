"""The detector of DEFEND: a teacher, a student, and how their disagreement is measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bigtrain.data.pictures import Picture
from bigtrain.data.views import Resized, to_float
from bigtrain.models.attention import Backend, Precision, torch_dtype
from bigtrain.models.weights import Pretrained, load_vit, save_vit
from bigtrain.objectives.losses import Distance, Normalisation
from bigtrain.objectives.scores import distillation_score

Given = Image.Image | NDArray[np.uint8] | str | Path  # a picture, open or in a file


@dataclass(frozen=True)
class Scoring:
    """How a detector turns a picture into a score; kept in detector.json."""

    image_size: int
    normalisation: Normalisation
    normalise_student: bool
    distance: Distance
    distilled_blocks: int
    precision: Precision
    attention: Backend
    """Where it is not to be had on the device that loads the detector, another takes its place."""
    batch: int
    """Images a forward pass. Short batches are filled up: a kernel's rounding can depend on the batch's shape."""
    threshold: float | None = None
    """Score above which `threshold_quantile` of the held-out known training images do not lie."""
    threshold_quantile: float | None = None


class DistillationDetector:
    method: ClassVar[str] = "defend"

    def __init__(self, teacher: Pretrained, student: Pretrained, scoring: Scoring) -> None:
        self.teacher, self.student, self.scoring = teacher, student, scoring
        teacher.vit.eval()
        student.vit.eval()

    @property
    def device(self) -> torch.device:
        return next(self.student.vit.parameters()).device

    def score(self, images: Iterable[Given]) -> NDArray[np.float64]:
        """Novelty of each image, higher = more novel: shape (B,)."""
        parts = [scores for scores, _ in self._score(images)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def score_map(self, images: Iterable[Given]) -> NDArray[np.float32]:
        """Novelty of each patch of each image: shape (B, h, w); its mean over patches is the image's score."""
        side = self.scoring.image_size // self.teacher.vit.patch_size
        return np.concatenate([np.zeros((0, side, side), np.float32), *(maps for _, maps in self._score(images))])

    def _score(self, images: Iterable[Given]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float32]]]:
        resize = Resized(self.scoring.image_size)
        rest = iter(images)
        while some := list(islice(rest, self.scoring.batch)):
            views = np.stack([resize(_open(image), np.random.default_rng(0))["image"] for image in some])
            image_B3HW = torch.zeros(self.scoring.batch, *views.shape[1:], dtype=torch.uint8)
            image_B3HW[: len(views)] = torch.from_numpy(views)
            score_B, map_Bhw = self.score_tensor(image_B3HW.to(self.device))
            yield score_B[: len(views)].double().cpu().numpy(), map_Bhw[: len(views)].cpu().numpy()

    @torch.no_grad()
    def score_tensor(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Score resized uint8 images on the detector's device: score_B and map_Bhw, float32."""
        how = self.scoring
        image_B3HW = to_float(image_B3HW, self.teacher.mean, self.teacher.std)
        with torch.autocast(self.device.type, torch_dtype(how.precision), enabled=how.precision != "fp32"):
            (teacher,) = self.teacher.vit(image_B3HW, last=how.distilled_blocks)
            (student,) = self.student.vit(image_B3HW, last=how.distilled_blocks)
        score_B, map_BN = distillation_score(
            student.blocks_LBND,
            teacher.blocks_LBND,
            normalisation=how.normalisation,
            normalise_student=how.normalise_student,
            distance=how.distance,
        )
        side = how.image_size // self.teacher.vit.patch_size
        return score_B, map_BN.unflatten(1, (side, side))

    def calibrate(self, known_score_N: NDArray[np.floating], quantile: float = 0.95) -> float | None:
        """Set the threshold to a score that `quantile` of held-out known images do not exceed; None without images."""
        if len(known_score_N) == 0:
            return None
        threshold = float(np.quantile(known_score_N, quantile, method="higher"))
        self.scoring = replace(self.scoring, threshold=threshold, threshold_quantile=quantile)
        return threshold

    def save(self, folder: Path) -> None:
        """Write detector.json and two .safetensors; the folder appears whole, under its name, at the end."""
        temporary = folder.with_name(folder.name + ".tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        for name, net in (("teacher", self.teacher), ("student", self.student)):
            save_vit(temporary / f"{name}.safetensors", net.vit, net.architecture, mean=net.mean, std=net.std)
        record = {"method": self.method, "version": 1, **asdict(self.scoring)}
        (temporary / "detector.json").write_text(json.dumps(record, indent=1) + "\n")
        if folder.exists():  # a run that was stopped behind this point writes the same once more
            for file in temporary.iterdir():
                file.replace(folder / file.name)
            temporary.rmdir()
        else:
            temporary.rename(folder)

    @classmethod
    def load(cls, folder: Path, *, device: str | None = None) -> DistillationDetector:
        record = json.loads((folder / "detector.json").read_text())
        scoring = Scoring(**{key: value for key, value in record.items() if key not in ("method", "version")})
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        attention = "auto" if scoring.attention == "xformers" and target.type != "cuda" else scoring.attention
        networks = [
            load_vit(str(folder / f"{name}.safetensors"), attention=attention) for name in ("teacher", "student")
        ]
        for network in networks:
            network.vit.to(target)
        return cls(networks[0], networks[1], scoring)


def _open(image: Given) -> Picture:
    return Picture(Path(image).read_bytes()) if isinstance(image, str | Path) else Picture.of(image)
