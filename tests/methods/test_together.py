"""Students of one teacher, scored in one pass."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from bigtrain.methods.defend.detector import DistillationDetector
from bigtrain.methods.defend.together import score_together
from tests.methods.test_defend_detector import a_detector


def test_same_scores():
    """Scores of many students are those of each alone, bit for bit, and each teacher sees a batch once."""
    first = a_detector()
    students = [first]
    for seed in (1, 2):
        torch.manual_seed(seed)
        student = copy.deepcopy(first.student)
        for parameter in student.vit.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        students.append(DistillationDetector(copy.deepcopy(first.teacher), student, first.scoring))
    other_teacher = copy.deepcopy(first.teacher)
    next(other_teacher.vit.parameters()).data.add_(0.1)
    students.append(DistillationDetector(other_teacher, first.student, first.scoring))
    images = [np.random.default_rng(n).integers(0, 256, (40, 30, 3), dtype=np.uint8) for n in range(7)]
    calls = []
    for detector in students:
        detector.teacher.vit.register_forward_hook(lambda module, *given: calls.append(module))
    alone = np.stack([detector.score(images) for detector in students])
    calls.clear()
    assert score_together(students, images).tolist() == alone.tolist()
    batches = -(-len(images) // first.scoring.batch)
    assert len(calls) == 2 * batches and len(set(map(id, calls))) == 2


def test_different_views():
    """Detectors that see their pictures at different sizes are refused."""
    one = a_detector()
    other = DistillationDetector(one.teacher, one.student, replace(one.scoring, image_size=64))
    with pytest.raises(ValueError, match="must see the same pictures, and these see: Resized"):
        score_together([one, other], [])
