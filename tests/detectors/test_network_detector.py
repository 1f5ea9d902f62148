"""A detector on a network, saved and loaded: the same bits, with every method."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bigtrain
from bigtrain.data.decode import Picture
from bigtrain.data.views import CentreCrop
from bigtrain.detectors.catalogue import EVERY, ON_FEATURES, ON_LOGITS, detector_class
from bigtrain.detectors.classical.logits import MaxLogit
from bigtrain.detectors.network_detector import NetworkDetector, Scoring
from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network, build_trunk

SCORING = Scoring(image_size=32, resize=36, precision="fp32", batch=5, layer="", head="")
ON_HEAD = replace(SCORING, head="known")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    trunk, head = build_trunk(Architecture("resnet18")).eval(), nn.Linear(512, 3)
    return Network(trunk, Architecture("resnet18"), (0.5,) * 3, (0.2,) * 3, {"known": head}, {"known": ("a", "b", "c")})


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + i, 30, 3), np.uint8)) for i in range(12)]


@pytest.mark.parametrize("name", EVERY)
def test_save_load_same_bits(network, pictures, tmp_path, name):
    """With every method a loaded detector gives the same bits and threshold, and no pickle is saved."""
    scoring = SCORING if name in ON_FEATURES else ON_HEAD
    detector = NetworkDetector(network, detector_class(name)(), scoring)
    rng = np.random.default_rng(0)
    width = 3 if name in ON_LOGITS else 512
    class_N = np.arange(30) % 3
    detector.detector.fit(np.abs(rng.normal(size=(30, width))) + 4 * np.eye(width)[class_N], class_N)
    scores = detector.score(pictures)
    detector.calibrate(scores, 0.5)
    detector.save(tmp_path / "detector")
    loaded = bigtrain.load_detector(tmp_path / "detector", device="cpu")
    np.testing.assert_array_equal(loaded.score(pictures), scores)
    # at another position in the batch a product may be summed in another order
    np.testing.assert_allclose(loaded.score(pictures[::-1]), scores[::-1], rtol=1e-6)
    assert loaded.scoring == detector.scoring and loaded.scoring.threshold in scores
    assert not list(tmp_path.rglob("*.pkl"))
    record = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert record["method"] == "network" and record["detector"]["name"] == name


def test_batches_fit_the_memory(network, pictures, monkeypatch, caplog):
    """A batch that does not fit the GPU's memory is scored in halves, with a warning; one picture, never."""
    detector = NetworkDetector(network, MaxLogit().fit(np.eye(3), [0, 1, 2]), replace(ON_HEAD, batch=8))
    expected, sizes, before = detector.score(pictures), [], detector.score_tensor

    def limited(image_B3HW, most=2):
        sizes.append(len(image_B3HW))
        if len(image_B3HW) > most:
            raise torch.OutOfMemoryError("no memory")
        return before(image_B3HW)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(detector, "score_tensor", limited)
    np.testing.assert_allclose(detector.score(pictures), expected, rtol=1e-5)
    assert sizes[:4] == [8, 4, 2, 2] and "do not fit the GPU's memory" in caplog.text
    views = [detector.view()(Picture.of(image), None)["image"] for image in pictures]
    class_N = before(torch.from_numpy(np.stack(views))).class_B.tolist()
    assert [each.class_name for each in detector.judge(pictures)] == ["abc"[number] for number in class_N]
    monkeypatch.setattr(detector, "score_tensor", lambda image: limited(image, most=0))
    with pytest.raises(torch.OutOfMemoryError):
        detector.score(pictures)


def test_centre_crop(network, pictures):
    """The detector sees only the centre of the picture."""
    detector = NetworkDetector(network, MaxLogit().fit(np.zeros((1, 3))), ON_HEAD)
    assert detector.view() == CentreCrop(32, 36)
    framed = pictures[0].resize((72, 72))
    outside = Image.new("RGB", (72, 72), "red")
    outside.paste(framed.crop((4, 4, 68, 68)), (4, 4))
    np.testing.assert_array_equal(detector.score([framed]), detector.score([outside]))


def test_known_class(network, pictures):
    """The detector says which known class a picture shows."""
    detector = NetworkDetector(network, MaxLogit().fit(np.zeros((1, 3))), ON_HEAD)
    view = torch.from_numpy(detector.view()(Picture.of(pictures[0]), np.random.default_rng(0))["image"])[None]
    found = detector.score_tensor(view)
    logits = detector.outputs(view)
    assert found.class_B.tolist() == logits.argmax(1).tolist() and found.score_B.tolist() == (-logits.amax(1)).tolist()
