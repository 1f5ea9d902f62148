"""Many students scored in one pass over the pictures: each is read once, and each teacher sees it once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.detectors.pictures import Given, Unreadable
from bigtrain.methods.defend.compared import CachedTeacherDetector
from bigtrain.methods.defend.detector import DistillationDetector


def score_together(
    detectors: Sequence[DistillationDetector], images: Iterable[Given], *, unreadable: Unreadable = "nan"
) -> NDArray[np.float64]:
    """Novelty of each image by each detector, (D, B), the same bits as `detector.score` one after another.

    As for a sweep over classes: the students of one teacher cost its forward pass once.

    Args:
        detectors: of one picture size, precision and batch.
        images, unreadable: see `ImageDetector.score`.

    Raises:
        ValueError: they see their pictures differently.
    """
    if len({(repr(d.view()), d.scoring.batch, d.device) for d in detectors}) != 1:
        seen = ", ".join(sorted({f"{d.view()} in batches of {d.scoring.batch} on {d.device}" for d in detectors}))
        raise ValueError(f"detectors that are to score together must see the same pictures, and these see: {seen}.")
    sharing: list[CachedTeacherDetector] = []
    for detector in detectors:
        same = next((d for d in sharing if is_same_teacher(d, detector)), None)
        sharing.append(CachedTeacherDetector(detector.teacher, detector.student, detector.scoring, same))
    parts = [np.zeros((len(detectors), 0))]
    for image_B3HW, is_read_b in sharing[0].batches(images, unreadable):
        parts.append(np.full((len(detectors), len(is_read_b)), np.nan))
        if image_B3HW is not None:
            scores = [d.score_tensor(image_B3HW).score_B[: is_read_b.sum()] for d in sharing]
            parts[-1][:, is_read_b] = np.stack([score_b.double().cpu().numpy() for score_b in scores])
    return np.concatenate(parts, axis=1)


def is_same_teacher(one: DistillationDetector, other: DistillationDetector) -> bool:
    """Whether the teachers give the same tokens."""

    def asked(detector: DistillationDetector) -> tuple[Any, ...]:
        how, teacher = detector.scoring, detector.teacher
        attended = how.score_over == "attended"
        return how.precision, how.distilled_blocks, attended, how.attention, teacher.mean, teacher.std

    if asked(one) != asked(other):
        return False
    first, second = (d.teacher.vit.state_dict() for d in (one, other))
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
