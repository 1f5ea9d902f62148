"""Which filters are globally negative, and what the page says of them, by hand."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from bigtrain.data.stream import Stream
from bigtrain.data.views import Resized
from bigtrain.methods.deep_novelty.page import against_most, write_filters
from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network
from tests.hand_made import png

KNOWN = np.array([[1.0, -1, -2, -1], [-1, -3, -1, 2]])
REFERENCE = np.array([[-1.0, 2, -1, 1], [1, -1, -2, 1]])


def test_globally_negative():
    """Globally negative: negative weights for all known classes, a positive one for some reference class."""
    assert against_most(KNOWN, REFERENCE, 1.0).tolist() == [False, True, False, False]


def test_against_most():
    """Negative for one class of two is a share of half; a reference class needs a positive weight as well."""
    assert against_most(KNOWN, REFERENCE, 0.5).tolist() == [True, True, False, True]
    assert against_most(KNOWN, REFERENCE, 0.6).tolist() == [False, True, False, False]


def test_activation_and_evidence(write_set, tmp_path):
    """Activation and evidence are as worked out by hand, and the page tells them with names escaped."""

    def stream(name, colours):
        images = [([name], png(np.full((8, 8, 3), colour, np.uint8))) for colour in colours]
        shard_set = write_set(images, name=name)
        return Stream(shard_set, shard_set.plan(np.arange(len(images)), 2, shuffle=False), Resized(8))

    streams = {
        "known": stream("<b>cat", [10, 20]),
        "novel": stream("dog", [40, 40]),
        "reference": stream("emu", [90, 40]),
    }

    def features(image_B3HW):  # filter 0 sees a constant, filter 1 the brightness
        grey_B = image_B3HW.float().mean(dim=(1, 2, 3))
        return torch.stack([torch.ones_like(grey_B), grey_B, 0 * grey_B, 0 * grey_B], dim=1)

    accelerator = Accelerator(cpu=True)
    heads = {name: torch.nn.Linear(4, 2) for name in ("known", "reference")}
    for name, weight in (("known", KNOWN), ("reference", REFERENCE)):
        heads[name].weight.data = torch.from_numpy(weight)
    classes = {"known": ("<b>cat", "ant"), "reference": ("emu", "gnu")}
    network = Network(torch.nn.Identity(), Architecture("none"), (0, 0, 0), (1, 1, 1), heads, classes)
    results = write_filters(tmp_path / "filters.html", accelerator, streams, features, network)
    assert (results["globally_negative"], results["filters"]) == (1, 4)
    # brightness is 10 20, 40 40, 90 40; its mean 40
    means = {kind: figure["value"] for kind, figure in results["activation"].items()}
    assert means == pytest.approx({"known": 15 / 40, "novel": 1, "reference": 65 / 40})
    # class 0 has the largest logit, 1 - brightness over -1 - 3 brightness: filter 1 subtracts the brightness
    evidence = {kind: figure["value"] for kind, figure in results["evidence"].items()}
    assert evidence == pytest.approx({"known": -15, "novel": -40, "reference": -65})
    graded = {one["share"]: one for one in results["graded"]}
    assert [graded[share]["filters"] for share in (1.0, 0.5)] == [1, 2]  # filter 3 sees nothing here
    assert graded[1.0]["activation"] == results["activation"]
    # filter 0 is 1 for every picture, filter 1 as above
    half = {kind: figure["value"] for kind, figure in graded[0.5]["activation"].items()}
    assert half == pytest.approx({"known": (1 + 15 / 40) / 2, "novel": 1, "reference": (1 + 65 / 40) / 2})
    page = (tmp_path / "filters.html").read_text()
    assert "1 of 4 filters are globally negative" in page and "<b>cat" not in page and "&lt;b&gt;cat" in page
    assert "of the reference most for emu" in page
