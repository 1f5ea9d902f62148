"""The detector of DEFEND: a teacher, a student, and how their disagreement is measured."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigtrain.choices import Backend, Chosen, Distance, Normalisation, Predict, ScoreOver
from bigtrain.data.views import Resized
from bigtrain.detectors import image_detector
from bigtrain.detectors.classical.nearest import token_features
from bigtrain.detectors.image_detector import ImageDetector, Scored, chosen_device
from bigtrain.detectors.record import read_record, read_scoring
from bigtrain.methods.defend.equations import picture_score
from bigtrain.methods.defend.masks import complementary_halves, visible_count
from bigtrain.models.load_network import load_network
from bigtrain.models.masking import Visible, visible_numbers
from bigtrain.models.network import Network
from bigtrain.models.vit import Encoded
from bigtrain.objectives.token_distances import normalised, patch_distance


@dataclass(frozen=True, kw_only=True)
class Scoring(image_detector.Scoring):
    normalisation: Normalisation
    normalise_student: bool
    distance: Distance
    distilled_blocks: int
    attention: Backend  # Where the loading device does not support it, another backend is used.
    predict: Predict = "visible"  # Which patches the student has learnt to predict.
    score_pairs: int = 8
    """With "hidden" and "all", which are scored alike: pairs of complementary halves of a picture to be seen."""
    score_over: ScoreOver = "mean"
    score_quantile: float = 0.25


def scoring_of(config: Any, precision: Chosen) -> Scoring:
    """How the detector of a run scores, by the settings of recipes/defend.py."""
    same = [field.name for field in fields(Scoring) if hasattr(config, field.name) and field.name != "precision"]
    return Scoring(precision=precision, batch=config.score_batch, **{name: getattr(config, name) for name in same})


class DistillationDetector(ImageDetector):
    method: ClassVar[str] = "defend"
    halves_at_once = 1  # Of a picture, in one pass: more only in a graph that is written out, where each pass is long.

    def __init__(self, teacher: Network, student: Network, scoring: Scoring) -> None:
        self.teacher, self.student, self.scoring = teacher, student, scoring
        self._made: list[Visible] = []
        teacher.vit.eval()
        student.vit.eval()

    @property
    def device(self) -> torch.device:
        return next(self.student.vit.parameters()).device

    def view(self) -> Resized:
        return Resized(self.scoring.image_size)

    @property
    def map_side(self) -> int:  # type: ignore[override]
        return self.scoring.image_size // self.teacher.vit.patch_size

    @torch.no_grad()
    def score_tensor(self, image_B3HW: Tensor) -> Scored:
        """Score resized uint8 images on the detector's device: score_B and map_Bhw, float32.

        The map is || norm(F_t) - norm(F_s) ||^2 of each patch (3.3), >= 0 and exactly 0 where both agree. A student of
        visible patches sees the whole picture, once. One that completes hidden patches sees pairs of complementary
        halves, and a patch's score is its mean over the halves that hide it: what it sees it could copy.
        """
        teacher = self.encode_by_teacher(image_B3HW)
        image_B3HW = self.student.normalise(image_B3HW)
        if self.scoring.predict == "visible":
            with self.autocast():
                (student,) = self.student.vit(image_B3HW, last=self.scoring.distilled_blocks)
            return self._scored(self._distance(student.blocks_LBND, teacher.blocks_LBND), teacher)
        images, patches = teacher.tokens_BND.shape[:2]
        total_BN = torch.zeros(images, patches, device=image_B3HW.device)
        for halves in self._halves(image_B3HW.device):  # a group of K
            visible, count = halves.of_images(images), halves.visible_BN.shape[0]
            with self.autocast():
                (student,) = self.student.vit(
                    image_B3HW.repeat(count, 1, 1, 1), visible_BN=visible, last=self.scoring.distilled_blocks
                )
            map_KBN = self._distance(student.blocks_LBND, teacher.blocks_LBND.repeat(1, count, 1, 1))
            total_BN += (map_KBN * ~visible.visible_BN).unflatten(0, (count, images)).sum(dim=0)
        return self._scored(total_BN / self.scoring.score_pairs, teacher)

    def _halves(self, device: torch.device) -> list[Visible]:
        """What the student sees, in groups of `halves_at_once` that show equally many patches; made once."""
        if not self._made or self._made[0].visible_BN.device != device:
            patches = self.map_side**2
            half, every = visible_count(patches, 0.5), complementary_halves(patches, self.scoring.score_pairs, device)
            groups = zip(every[::2].split(self.halves_at_once), every[1::2].split(self.halves_at_once), strict=True)
            counts = half, patches - half
            self._made = [visible_numbers(*each) for pair in groups for each in zip(pair, counts, strict=True)]
        return self._made

    @torch.no_grad()
    def target(self, image_B3HW: Tensor) -> Tensor:
        """The teacher's tokens as they are compared, float32 (B, L, N, D)."""
        teacher = self.encode_by_teacher(image_B3HW)
        return normalised(teacher.blocks_LBND.float(), self.scoring.normalisation).transpose(0, 1)

    def constant_map(self, image_B3HW: Tensor, constant: Tensor) -> Tensor:
        """The map (B, h, w) of such a student."""
        found = self._constant(image_B3HW, constant).map_Bhw
        assert found is not None
        return found

    def constant_score(self, image_B3HW: Tensor, constant: Tensor) -> Tensor:
        """The score (B,) of a student that ignores the picture and always answers with the same tokens, such as the
        mean `target` of the known pictures: what a student scores that has learnt nothing."""
        return self._constant(image_B3HW, constant).score_B

    @torch.no_grad()
    def _constant(self, image_B3HW: Tensor, constant: Tensor) -> Scored:
        teacher = self.encode_by_teacher(image_B3HW)
        constant_LBND = constant[:, None].expand_as(teacher.blocks_LBND)  # (L, N, D)
        return self._scored(self._distance(constant_LBND, teacher.blocks_LBND), teacher)

    @torch.no_grad()
    def encode_by_teacher(self, image_B3HW: Tensor) -> Encoded:
        """The teacher's tokens of resized uint8 images (B, 3, H, W); its attention too where the score needs it."""
        with self.autocast():
            (teacher,) = self.teacher.vit(
                self.teacher.normalise(image_B3HW),
                last=self.scoring.distilled_blocks,
                with_attention=self.scoring.score_over == "attended",
            )
        return teacher

    def features(self, image_B3HW: Tensor) -> Tensor:
        """What the teacher sees in an image, for nearest neighbours: float32 (B, D)."""
        return token_features(self.encode_by_teacher(image_B3HW).tokens_BND)

    def _distance(self, student_LBND: Tensor, teacher_LBND: Tensor) -> Tensor:
        how = self.scoring
        return patch_distance(
            student_LBND,
            teacher_LBND,
            normalisation=how.normalisation,
            normalise_student=how.normalise_student,
            distance=how.distance,
        )

    def _scored(self, map_BN: Tensor, teacher: Encoded) -> Scored:
        how = self.scoring
        score_B = picture_score(map_BN, how.score_over, quantile=how.score_quantile, attention_BN=teacher.attention_BN)
        return Scored(score_B, map_BN.unflatten(1, (self.map_side, self.map_side)))

    def _write(self, folder: Path) -> dict[str, Any]:
        for name, network in (("teacher", self.teacher), ("student", self.student)):
            network.save(folder / f"{name}.safetensors")
        return {}

    @classmethod
    def _load(cls, folder: Path, *, device: str | None = None) -> DistillationDetector:
        scoring = read_scoring(Scoring, read_record(folder), folder)
        target = chosen_device(device)
        attention = "auto" if scoring.attention == "xformers" and target.type != "cuda" else scoring.attention
        teacher, student = (
            load_network(folder / f"{name}.safetensors", attention=attention, device=target)
            for name in ("teacher", "student")
        )
        return cls(teacher, student, scoring)
