"""The judge, on a detector that scores the brightness of a picture: figures by hand."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from bigtrain.data.protocol import Protocol, Split
from bigtrain.data.stream import Stream
from bigtrain.data.views import Resized
from bigtrain.detectors.image_detector import ImageDetector, Scored, Scoring
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

    def target(self, image_B3HW):
        return image_B3HW.float().mean(dim=(1, 2, 3)) / 100

    def constant_score(self, image_B3HW, constant):
        return 2 * self.target(image_B3HW) + 4 * constant  # the mean target of the known pictures is .25

    def _write(self, folder):
        return {}


@pytest.fixture
def judged(write_set, tmp_path):
    """judged(test pictures as (classes, brightness)) -> results, with cats known and a constant predictor beside."""

    def made(pictures):
        def shard_set(name, some):
            return write_set([(classes, png(np.full((8, 8, 3), grey, np.uint8))) for classes, grey in some], name=name)

        def read(shard_set, sample_N):
            return Stream(shard_set, shard_set.plan(sample_N, 4, shuffle=False), Resized(8))

        train = shard_set("train", [(["cat"], grey) for grey in (10, 20, 30, 40)])
        test = shard_set("test", pictures)
        everything_N = np.arange(len(train))
        split = Split(Protocol(("cat",), ("dog",)), train, test, everything_N, everything_N, np.arange(len(test)))
        detector = Brightness()
        return judge(
            tmp_path, Accelerator(cpu=True), detector, split, read,
            method="brightness", plain={"pixels": lambda image_B3HW: image_B3HW.float().flatten(1)},
            bank_N=everything_N, settings={}, seed=0, floors={"nothing learnt": detector},
        )  # fmt: skip

    return made


def test_explained(judged):
    """The share of the floor's error that is explained, on held-out known pictures and on novel ones."""
    results = judged([(["cat"], 10), (["cat"], 60), (["dog"], 50), (["dog"], 90)])
    assert results["auroc"]["value"] == 0.75
    # held out .1 .2 .3 .4, the floor's 1.2 1.4 1.6 1.8; novel .5 .9, the floor's 2 2.8
    assert results["explained"]["value"] == pytest.approx(1 - 1 / 6)
    assert results["explained_novel"]["value"] == pytest.approx(1 - 1.4 / 4.8)
    assert set(results["comparisons"]) == {"nothing learnt", "nearest neighbour on pixels"}
    assert results["comparisons"]["nothing learnt"]["auroc"]["value"] == 0.75
    assert "auroc_annotated" not in results


def test_pictures_without_class(judged, tmp_path):
    """A picture without classes is novel; the AUROC without such pictures is reported beside the overall one."""
    results = judged([(["cat"], 10), (["cat"], 60), (["dog"], 50), (["dog"], 90), ([], 5), ([], 8)])
    assert results["counts"] == {"known": 2, "novel": 4}
    assert results["auroc"]["value"] == 3 / 8
    assert results["auroc_annotated"]["value"] == 0.75
    assert json.loads((tmp_path / "detector" / "detector.json").read_text())["threshold"] == pytest.approx(0.4)
