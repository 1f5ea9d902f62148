"""What stands beside DEFEND's figure: nearest neighbours on its teachers, and students that have learnt nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from bigtrain.detectors.classical.nearest import pixel_features
from bigtrain.evaluation.judge import Features
from bigtrain.methods.defend.detector import DistillationDetector, Scoring
from bigtrain.models.network import Network
from bigtrain.models.vit import Encoded


class CachedTeacherDetector(DistillationDetector):
    """Keeps the teacher's tokens of the latest batch: several figures need them, or several students of one teacher.

    Args:
        sharing: another one with the same teacher, whose tokens serve this one too.
    """

    def __init__(
        self, teacher: Network, student: Network, scoring: Scoring, sharing: CachedTeacherDetector | None = None
    ) -> None:
        super().__init__(sharing.teacher if sharing else teacher, student, scoring)
        self.latest: list[tuple[Tensor, Encoded]] = sharing.latest if sharing else []

    def encode_by_teacher(self, image_B3HW: Tensor) -> Encoded:
        """As the detector's, of uint8 images (B, 3, H, W)."""
        if not self.latest or self.latest[0][0] is not image_B3HW:
            self.latest[:] = [(image_B3HW, super().encode_by_teacher(image_B3HW))]
        return self.latest[0][1]


class Compared(NamedTuple):
    detector: CachedTeacherDetector
    plain: Mapping[str, Features]
    floors: Mapping[str, DistillationDetector]


def compared(given: Network, teacher: Network, student: Network, scoring: Scoring, *, is_tuned: bool) -> Compared:
    """The detector, and what it is compared with: for the tuned teacher and for the given one, which tells tuning (3.1)
    from distillation (3.2).

    Args:
        given: the teacher before it was tuned; it is `teacher` where nothing was tuned.
    """
    detector = CachedTeacherDetector(teacher, student, scoring)
    of_given = CachedTeacherDetector(given, student, scoring) if is_tuned else detector
    plain: dict[str, Features] = {"pixels": pixel_features, "features of the given teacher": of_given.features}
    floors = {"a student that ignores the picture": detector}
    if is_tuned:
        plain["features of the tuned teacher"] = detector.features
        floors["a student that ignores the picture (given teacher)"] = of_given
    return Compared(detector, plain, floors)
