"""The detector of DEFEND: a teacher, a student, and how their disagreement is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.choices import Backend, Distance, Normalisation
from bigtrain.data.views import Resized, to_float
from bigtrain.detectors import saved
from bigtrain.detectors.saved import Given, ImageDetector, Scored, chosen_device, read_record
from bigtrain.models.weights import Pretrained, load_vit, save_vit
from bigtrain.objectives.scores import distillation_score


@dataclass(frozen=True, kw_only=True)
class Scoring(saved.Scoring):
    normalisation: Normalisation
    normalise_student: bool
    distance: Distance
    distilled_blocks: int
    attention: Backend
    """Where it is not to be had on the device that loads the detector, another takes its place."""


class DistillationDetector(ImageDetector):
    method: ClassVar[str] = "defend"

    def __init__(self, teacher: Pretrained, student: Pretrained, scoring: Scoring) -> None:
        self.teacher, self.student, self.scoring = teacher, student, scoring
        teacher.vit.eval()
        student.vit.eval()

    @property
    def device(self) -> torch.device:
        return next(self.student.vit.parameters()).device

    def view(self) -> Resized:
        return Resized(self.scoring.image_size)

    def score_map(self, images: Iterable[Given]) -> NDArray[np.float32]:
        """Novelty of each patch of each image: shape (B, h, w); its mean over patches is the image's score."""
        side = self.scoring.image_size // self.teacher.vit.patch_size
        maps = [found.map_Bhw.cpu().numpy() for found in self._score(images) if found.map_Bhw is not None]
        return np.concatenate([np.zeros((0, side, side), np.float32), *maps])

    @torch.no_grad()
    def score_tensor(self, image_B3HW: Tensor) -> Scored:
        """Score resized uint8 images on the detector's device: score_B and map_Bhw, float32."""
        how = self.scoring
        image_B3HW = to_float(image_B3HW, self.teacher.mean, self.teacher.std)
        with self.autocast():
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
        return Scored(score_B, map_BN.unflatten(1, (side, side)))

    def _write(self, folder: Path) -> dict[str, Any]:
        for name, net in (("teacher", self.teacher), ("student", self.student)):
            save_vit(folder / f"{name}.safetensors", net.vit, net.architecture, mean=net.mean, std=net.std)
        return {}

    @classmethod
    def load(cls, folder: Path, *, device: str | None = None) -> DistillationDetector:
        scoring = Scoring(**read_record(folder))
        target = chosen_device(device)
        attention = "auto" if scoring.attention == "xformers" and target.type != "cuda" else scoring.attention
        networks = [
            load_vit(str(folder / f"{name}.safetensors"), attention=attention) for name in ("teacher", "student")
        ]
        for network in networks:
            network.vit.to(target)
        return cls(networks[0], networks[1], scoring)
