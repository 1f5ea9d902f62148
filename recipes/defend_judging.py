"""DEFEND's novelty (3.3) on held-out known and on test images, and what stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from bigtrain.data.protocol import seeded_choice
from bigtrain.data.stream import Stream
from bigtrain.data.views import Resized
from bigtrain.detectors.distillation import DistillationDetector, Scoring
from bigtrain.detectors.neighbours import pixel_features, token_features
from bigtrain.evaluation.collect import mean_over
from bigtrain.evaluation.judge import Features, judge
from bigtrain.models.vit import Encoded
from bigtrain.models.weights import Pretrained
from bigtrain.runtime.settings import result_settings
from recipes.defend_settings import Config
from recipes.network_settings import Data
from recipes.run_setup import Setup


def judged(
    config: Config, setup: Setup, data: Data, given: Pretrained, teacher: Pretrained, student: Pretrained
) -> dict[str, Any]:
    """The detector of teacher and student, saved and judged: the record of results.json.

    Args:
        given: the teacher before it was tuned.
    """
    parts = data.parts
    scoring = Scoring(
        image_size=config.image_size,
        normalisation=config.normalisation,
        normalise_student=config.normalise_student,
        distance=config.distance,
        distilled_blocks=config.distilled_blocks,
        precision=setup.precision,
        attention=config.attention,
        batch=config.score_batch,
        predict=config.predict,
        score_pairs=config.score_pairs,
        score_over=config.score_over,
        score_quantile=config.score_quantile,
    )
    detector = CachedTeacherDetector(teacher, student, scoring)
    views = Resized(config.image_size)
    bank_N = seeded_choice(parts.fitted_N, config.neighbours_bank, config.seed)
    bank = partial(setup.in_order, data.train, bank_N, views, config.score_batch)
    plain, floors = plain_figures(config, setup, given, detector, bank)
    held_out = (
        setup.in_order(data.train, parts.held_out_N, views, config.score_batch) if len(parts.held_out_N) else None
    )
    return judge(
        setup.run.path,
        setup.accelerator,
        detector,
        method="DEFEND" if config.tune else "masked distillation",
        protocol=data.protocol,
        test=setup.in_order(data.test, parts.test_N, views, config.score_batch),
        held_out=held_out,
        bank=bank(),
        plain=plain,
        settings=result_settings(config),
        seed=config.seed,
        floors=floors,
    )


class CachedTeacherDetector(DistillationDetector):
    """Keeps the teacher's tokens of the latest batch: the score and all plain figures beside it need them."""

    latest: tuple[Tensor, Encoded] | None = None

    def encode_by_teacher(self, image_B3HW: Tensor) -> Encoded:
        if self.latest is None or self.latest[0] is not image_B3HW:
            self.latest = image_B3HW, super().encode_by_teacher(image_B3HW)
        return self.latest[1]

    def features(self, image_B3HW: Tensor) -> Tensor:
        """Of the teacher, for nearest neighbours."""
        return token_features(self.encode_by_teacher(image_B3HW).tokens_BND)


def plain_figures(
    config: Config, setup: Setup, given: Pretrained, detector: CachedTeacherDetector, bank: Callable[[], Stream]
) -> tuple[dict[str, Features], dict[str, Features]]:
    """What stands beside the detector: features for nearest neighbours, and the scores of a student that has learnt
    nothing; of a tuned teacher and of the given one, which tells tuning (3.1) from distillation (3.2)."""
    of_given = CachedTeacherDetector(given, detector.student, detector.scoring) if config.tune else detector
    plain: dict[str, Features] = {"pixels": pixel_features, "features of the given teacher": of_given.features}
    of_teachers = {"": detector}
    if config.tune:
        plain["features of the tuned teacher"] = detector.features
        of_teachers[" (given teacher)"] = of_given
    floors: dict[str, Features] = {}
    for whose, its in of_teachers.items():
        constant_LND = mean_over(setup.accelerator, bank(), its.target)
        floors[f"a student that ignores the picture{whose}"] = partial(its.constant_score, constant_LND=constant_LND)
    return plain, floors
