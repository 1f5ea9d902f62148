"""The judge, on a detector that scores the brightness of a picture: figures by hand."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from bigtrain.data.protocol import Protocol
from bigtrain.data.stream import Stream
from bigtrain.data.views import Resized
from bigtrain.detectors.saved import ImageDetector, Scored, Scoring
from bigtrain.evaluation.judge import judge
from tests.hand_made import png


class Brightness(ImageDetector):
    method = "brightness"

    def __init__(self):
        self.scoring = Scoring(image_size=8, precision="fp32", batch=4)

    @property
    def device(self):
        return torch.device("cpu")

    def view(self):
        return Resized(8)

    def score_tensor(self, image_B3HW):
        return Scored(image_B3HW.float().mean(dim=(1, 2, 3)) / 100)

    def _write(self, folder):
        return {}


@pytest.fixture
def judged(write_set, tmp_path):
    """judged(test pictures as (classes, brightness)) -> results, with cats known and a floor of twice the score + 1."""

    def made(pictures):
        def stream(name, some):
            images = [(classes, png(np.full((8, 8, 3), grey, np.uint8))) for classes, grey in some]
            shard_set = write_set(images, name=name)
            return Stream(shard_set, shard_set.plan(np.arange(len(images)), 4, shuffle=False), Resized(8))

        known = [(["cat"], grey) for grey in (10, 20, 30, 40)]
        detector = Brightness()
        return judge(
            tmp_path, Accelerator(cpu=True), detector,
            method="brightness", protocol=Protocol(("cat",), ("dog",)),
            test=stream("test", pictures), held_out=stream("held_out", known), bank=stream("bank", known),
            plain={"pixels": lambda image_B3HW: image_B3HW.float().flatten(1)}, settings={}, seed=0,
            floors={"nothing learnt": lambda image_B3HW: 2 * detector.score_tensor(image_B3HW).score_B + 1},
        )  # fmt: skip

    return made


def test_explained(judged):
    """By what share errors are below the floor's, on held-out known pictures and on novel ones."""
    results = judged([(["cat"], 10), (["cat"], 60), (["dog"], 50), (["dog"], 90)])
    assert results["auroc"]["value"] == 0.75
    # held out .1 .2 .3 .4 of 1.2 1.4 1.6 1.8; novel .5 .9 of 2 2.8
    assert results["explained"]["value"] == pytest.approx(1 - 1 / 6)
    assert results["explained_novel"]["value"] == pytest.approx(1 - 1.4 / 4.8)
    assert set(results["comparisons"]) == {"nothing learnt", "nearest neighbour on pixels"}
    assert results["comparisons"]["nothing learnt"]["auroc"]["value"] == 0.75
    assert "auroc_annotated" not in results


def test_pictures_without_class(judged, tmp_path):
    """A picture that shows nothing is novel; the figure without such pictures stands beside the whole one."""
    results = judged([(["cat"], 10), (["cat"], 60), (["dog"], 50), (["dog"], 90), ([], 5), ([], 8)])
    assert results["counts"] == {"known": 2, "novel": 4}
    assert results["auroc"]["value"] == 3 / 8
    assert results["auroc_annotated"]["value"] == 0.75
    assert json.loads((tmp_path / "detector" / "detector.json").read_text())["threshold"] == pytest.approx(0.4)
