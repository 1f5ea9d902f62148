"""Extreme value signatures from end to end, on a few pictures and a tiny network."""

import json

import numpy as np
import pytest
import torch

import bigtrain
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.data.views import CentreCrop
from bigtrain.models.load_network import load_network
from bigtrain.runtime.exit_codes import STOPPED
from bigtrain.training.run_setup import Setup
from recipes.signatures import main
from tests.runs import scores

KNOWN = ["ankle_boot", "bag", "coat"]


@pytest.fixture
def flags(views):
    return [
        *("--train", str(views / "train"), "--test", str(views / "test"), "--network", "test_resnet"),
        *("--no-pretrained", "--image-size", "32", "--resize", "32", "--test-limit", "120", "--train-limit", "90"),
        *("--score-batch", "32", "--neighbours-bank", "60", "--share", "0.2", "--known", *KNOWN),
    ]


def test_mean_features(flags, views, tmp_path):
    """Signatures are those of the mean features of each class's training images."""
    run = tmp_path / "run"
    main([*flags, "--layer", "layer2", "--validation-share", "0", "--train-limit", "0", "--out", str(run)])
    network = load_network(str(run / "detector" / "network.safetensors"))
    train = ShardSet(str(views / "train"))
    sample_N = np.flatnonzero(train.shows_any(tuple(KNOWN)))
    features = network.pooled("layer2")
    means = {name: [] for name in KNOWN}
    with torch.no_grad():
        for batch in Stream(train, train.plan(sample_N, 50, shuffle=False), CentreCrop(32, 32)).batches():
            seen_BD = features(network.normalise(batch.views["image"]))
            for sample, feature_D in zip(batch.sample_B.tolist(), seen_BD, strict=True):
                if sample >= 0:
                    means[train.classes_of(sample)[0]].append(feature_D.double())
    mean_CD = torch.stack([torch.stack(means[name]).mean(dim=0) for name in KNOWN])
    detector = bigtrain.load_detector(run / "detector", device="cpu").detector
    assert detector.classes_.tolist() == KNOWN
    np.testing.assert_allclose(detector.mean_CD_, mean_CD, rtol=1e-4, atol=1e-6)
    count = round(0.2 * mean_CD.shape[1])
    strongest = np.argsort(-detector.mean_CD_, axis=1)[:, :count]
    assert [set(np.flatnonzero(row)) for row in detector.signature_CD_] == [set(row) for row in strongest]
    results = json.loads((run / "results.json").read_text())
    assert results["method"] == "extreme value signatures" and results["threshold"] is None


def test_two_processes(run_of_twenty_steps):
    """Two processes add up to the mean features and scores of one."""
    runs = [run_of_twenty_steps("signatures", processes) for processes in (1, 2)]
    one, two = (bigtrain.load_detector(run / "detector", device="cpu").detector for run in runs)
    np.testing.assert_allclose(two.mean_CD_, one.mean_CD_, rtol=1e-5, atol=1e-6)
    tables = [scores(run) for run in runs]
    assert tables[0].key.tolist() == tables[1].key.tolist()
    np.testing.assert_allclose(tables[1].score, tables[0].score, atol=1e-5)


@pytest.mark.parametrize("overlap", ["weighted", "cosine"])
def test_the_overlap_is_a_setting(flags, tmp_path, overlap):
    main([*flags, "--overlap", overlap, "--out", str(tmp_path / "run")])
    assert bigtrain.load_detector(tmp_path / "run" / "detector", device="cpu").detector.overlap == overlap


def test_page(flags, tmp_path):
    """The page shows the matrix of classes and dimensions, what classes share, and pictures."""
    main([*flags, "--out", str(tmp_path / "run")])
    page = (tmp_path / "run" / "signatures.html").read_text()
    assert "<h2>Classes and dimensions</h2>" in page and "ankle_boot and bag: " in page and "://" not in page
    assert page.count("<figure") == (3 + 3) * 3 * 6  # pairs and classes, dimensions, pictures


def test_one_class_is_enough(flags, tmp_path):
    main([*flags[: flags.index("--known")], "--known", "bag", "--out", str(tmp_path / "run")])
    page = (tmp_path / "run" / "signatures.html").read_text()
    assert "What two classes share" not in page and "What a class has of its own" in page


def test_stop_and_resume(flags, tmp_path, monkeypatch):
    """A run that is asked to stop leaves, and goes on to the same bits."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*flags]
    main([*flags, "--out", str(whole)])
    begin = Setup.begin

    def begin_and_ask(*arguments):
        setup = begin(*arguments)
        (stopped / "stop").touch()
        return setup

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Setup, "begin", begin_and_ask)
        main([*flags, "--out", str(stopped)])
    assert stop.value.code == STOPPED and not (stopped / "results.json").exists()
    main([*flags, "--out", str(stopped)])
    assert (stopped / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()


MISTAKES = {
    "no such layer": (["--layer", "layer7"], "no layer 'layer7'; it has "),
    "all dimensions": (["--share", "1"], "--share is 1.0"),
    "nothing known": (["--known"], "neither of --known and --novel"),
    "a network that gives NaN": (["--network", "BROKEN"], "weights that are NaN or infinite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(flags, tmp_path, capsys, mistake):
    further, says = MISTAKES[mistake]
    if "BROKEN" in further:
        state = load_network("test_resnet", pretrained=False).trunk.state_dict()
        state["layer4.0.conv1.weight"] = torch.full_like(state["layer4.0.conv1.weight"], torch.nan)
        torch.save(state, tmp_path / "broken.pth")
        further = ["--network", str(tmp_path / "broken.pth"), "--arch", "test_resnet"]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--out", str(tmp_path / "run"), *further])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and "Traceback" not in said
