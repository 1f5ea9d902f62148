"""A saved detector: the same bits after loading, in any order and grouping, from any kind of picture."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import bigtrain
from bigtrain.data.pictures import Picture
from bigtrain.data.views import Resized
from bigtrain.detectors.distillation import DistillationDetector, Scoring
from bigtrain.models.vit import Architecture, ViT, masked_student
from bigtrain.models.weights import Pretrained

SMALL = Architecture("vit_tiny_patch16_224", 32, 8, 2)
SCORING = Scoring(
    image_size=32,
    normalisation="l2",
    normalise_student=True,
    distance="squared",
    distilled_blocks=1,
    precision="fp32",
    attention="auto",
    batch=5,
)


def pretrained(vit, mean=(0.5, 0.4, 0.3)):
    return Pretrained(vit.eval().requires_grad_(False), SMALL, mean, (0.5, 0.5, 0.2), "")


def a_detector(**changes):
    torch.manual_seed(0)
    teacher, student = pretrained(ViT(SMALL.build())), pretrained(masked_student(SMALL))
    return DistillationDetector(teacher, student, replace(SCORING, **changes))


@pytest.fixture
def detector():
    return a_detector()


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + i, 30, 3), np.uint8)) for i in range(12)]


VARIANTS = [
    {},
    {"precision": "bf16"},
    {"distilled_blocks": 2, "normalisation": "none", "distance": "smooth_l1"},
    {"normalise_student": False, "batch": 1},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_save_load_same_bits(tmp_path, pictures, changes):
    """A loaded detector scores the same bits."""
    detector = a_detector(**changes)
    before, maps = detector.score(pictures), detector.score_map(pictures)
    detector.calibrate(before)
    detector.save(tmp_path / "detector")
    loaded = bigtrain.load_detector(tmp_path / "detector", device="cpu")
    assert loaded.scoring == detector.scoring
    assert (loaded.teacher.mean, loaded.teacher.std) == (detector.teacher.mean, detector.teacher.std)
    assert np.array_equal(loaded.score(pictures), before)
    assert np.array_equal(loaded.score_map(pictures), maps)
    assert np.array_equal(bigtrain.load_detector(str(tmp_path / "detector"), device="cpu").score(pictures), before)
    assert before.std() > 0


def test_order_and_grouping(detector, pictures):
    """A picture scores the same bits in any order and grouping."""
    together = detector.score(pictures)
    assert np.array_equal(detector.score(pictures[::-1]), together[::-1])
    assert np.array_equal(np.concatenate([detector.score([picture]) for picture in pictures]), together)
    assert np.array_equal(detector.score(picture for picture in pictures[3:]), together[3:])


def test_fixed_batch_shape(detector, pictures, monkeypatch):
    """Every forward pass has the shape it had in training, the last batch too."""
    shapes, score_tensor = [], detector.score_tensor
    monkeypatch.setattr(detector, "score_tensor", lambda image: [shapes.append(image.shape), score_tensor(image)][1])
    assert len(detector.score(pictures)) == 12
    assert shapes == [(5, 3, 32, 32)] * 3  # a kernel's rounding can depend on it


def test_input_kinds(detector, pictures, tmp_path):
    """Paths, arrays and pictures are the same input, and grey is taken as RGB."""
    pictures[0].save(tmp_path / "0.png")
    inputs = [pictures[0], np.asarray(pictures[0]), tmp_path / "0.png", str(tmp_path / "0.png")]
    scores = detector.score(inputs)
    assert len(set(scores.tolist())) == 1
    grey = Image.new("L", (9, 9), 77)
    assert detector.score([grey, np.asarray(grey)]).tolist() == detector.score([grey.convert("RGB")] * 2).tolist()


def test_score_map(detector, pictures):
    """The score is the mean of its map, and the map is the distance between the two networks' tokens."""
    scores, maps = detector.score(pictures[:2]), detector.score_map(pictures[:2])
    assert (scores.dtype, maps.shape) == (np.float64, (2, 4, 4))
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), scores, rtol=1e-5)
    image = torch.from_numpy(Resized(32)(Picture.of(pictures[1]), np.random.default_rng(0))["image"])[None] / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.5, 0.2]).view(3, 1, 1)
    tokens = []
    for network in (detector.teacher, detector.student):
        token_ND = network.vit.backbone.forward_features((image - mean) / std)[0, 1:]
        tokens.append(token_ND / token_ND.norm(dim=1, keepdim=True))
    expected = (tokens[0] - tokens[1]).square().sum(dim=1).view(4, 4)
    np.testing.assert_allclose(maps[1], expected.numpy(), rtol=1e-4)


def test_no_pictures_have_no_scores(detector):
    assert detector.score([]).shape == (0,)
    assert detector.score_map([]).shape == (0, 4, 4)


def test_student_is_teacher(detector, pictures):
    """A student that is the teacher finds nothing novel: every score is zero."""
    same = DistillationDetector(detector.teacher, detector.teacher, SCORING)
    assert not same.score(pictures).any()


def test_threshold(detector):
    """The threshold is one of the known scores, the first that the quantile does not exceed."""
    known = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    assert detector.calibrate(known) == 96  # the quantile lies between 95 and 96
    assert (detector.scoring.threshold, detector.scoring.threshold_quantile) == (96, 0.95)
    assert detector.calibrate(known, quantile=0.5) == 51
    assert (known <= detector.scoring.threshold).mean() >= 0.5
    assert detector.calibrate(np.array([2.5])) == 2.5


def test_threshold_without_images(detector):
    """Without held-out images there is no threshold."""
    assert detector.calibrate(np.zeros(0)) is None
    assert detector.scoring.threshold is None


def test_load_refuses(detector, tmp_path):
    """A folder without a detector and a detector of an unknown method are refused."""
    with pytest.raises(ValueError, match=r"holds no detector\.json: give the folder"):
        bigtrain.load_detector(tmp_path)
    detector.save(tmp_path / "detector")
    record = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert record == {"method": "defend", "version": 1, **asdict(detector.scoring)}
    (tmp_path / "detector" / "detector.json").write_text(json.dumps({**record, "method": "oracle"}))
    with pytest.raises(ValueError, match="is of method 'oracle'; this bigtrain loads defend"):
        bigtrain.load_detector(tmp_path / "detector")


def test_saved_files(detector, pictures, tmp_path):
    """A saved detector is JSON and safetensors, with no pickle, and saving again replaces it."""
    files = ["detector.json", "student.safetensors", "teacher.safetensors"]
    for batch in (5, 3):
        replaced = DistillationDetector(detector.teacher, detector.student, replace(SCORING, batch=batch))
        replaced.save(tmp_path / "detector")
        assert sorted(path.name for path in (tmp_path / "detector").iterdir()) == files
        assert bigtrain.load_detector(tmp_path / "detector", device="cpu").scoring.batch == batch
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


def test_lazy_names():
    """The package's only lazy name is `load_detector`: another is an AttributeError."""
    with pytest.raises(AttributeError, match="no attribute 'load_detectors'"):
        bigtrain.load_detectors  # noqa: B018
