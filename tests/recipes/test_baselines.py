"""The classical detectors from end to end: features once, all of them on those, one table."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import bigtrain
from bigtrain.data.shard_set import ShardSet
from bigtrain.detectors.network_detector import NetworkDetector
from bigtrain.evaluation.tables import read_results, table
from bigtrain.models.load_network import load_network
from bigtrain.runtime.exit_codes import STOPPED
from bigtrain.training.run_setup import Setup
from recipes.baselines import main
from tests.launching import run as started
from tests.made_once import made_once
from tests.runs import results as results_of
from tests.runs import scores

ON_FEATURES = {
    "nearest neighbours", "one-class SVM", "SVDD", "KNFST", "local KNFST", "K-extremes", "Mahalanobis",
    "Gaussian mixture",
}  # fmt: skip
KNOWN = ["ankle_boot", "bag", "coat"]


@pytest.fixture
def flags(views):
    return [
        *("--train", str(views / "train"), "--test", str(views / "test"), "--network", "test_resnet"),
        *("--no-pretrained", "--image-size", "32", "--resize", "32", "--test-limit", "120", "--train-limit", "90"),
        *("--score-batch", "32", "--local-neighbours", "40", "--share", "0.2", "--known", *KNOWN),
    ]


@pytest.fixture(scope="module")
def finetuned(views, tmp_path_factory):
    """The tiny network, fine-tuned for a moment on the known classes: row (a) of Perera & Patel 5.4."""

    def make(folder):
        given = ["--train", views / "train", "--test", views / "test", "--test-limit", 60, "--network", "test_resnet"]
        sizes = ["--no-pretrained", "--image-size", 32, "--resize", 32, "--batch", 30, "--steps", 50, "--lr", 1e-2]
        row_a = ["--branches", "one", "--membership-weight", 0, "--known", *KNOWN]
        done = started("deep_novelty.py", *given, *sizes, *row_a, "--out", folder / "run")
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "finetuned", make) / "run" / "network.safetensors"


def test_end_to_end(flags, finetuned, tmp_path, capsys):
    """One table has the rows of the pretrained and of the fine-tuned network, with scores and report."""
    run = tmp_path / "run"
    main([*flags, "--finetuned", str(finetuned), "--save", "KNFST", "OpenMax", "--out", str(run)])
    rows = results_of(run)["detectors"]
    assert set(rows) == {f"{name} pre" for name in ON_FEATURES} | ON_FEATURES | {"max logit", "max softmax", "OpenMax"}
    scores = pq.read_table(run / "scores.parquet").to_pandas()
    assert (scores.groupby("detector").size() == scores.groupby("detector").size().iloc[0]).all()
    for name, figures in rows.items():
        own = scores[(scores.detector == name) & (scores.split == "held_out")]
        assert (own.score > figures["threshold"]["value"]).mean() <= 0.05
        assert ("closed_set_accuracy" in figures) == (name in ("max logit", "max softmax", "OpenMax"))
    said = capsys.readouterr().out
    assert "KNFST: fitted in" in said and "AUROC" in said
    page = (run / "report.html").read_text()
    assert page.count('role="rowheader"') == len(rows) and "://" not in page
    for name in ("KNFST", "OpenMax"):
        detector = bigtrain.load_detector(run / "detectors" / name, device="cpu")
        assert detector.scoring.threshold == rows[name]["threshold"]["value"]


def test_saved_detector(flags, views, tmp_path):
    """A saved detector gives the scores that the run wrote down."""
    run = tmp_path / "run"
    main([*flags, "--detectors", "Mahalanobis", "--save", "Mahalanobis pre", "--out", str(run)])
    detector = bigtrain.load_detector(run / "detectors" / "Mahalanobis_pre", device="cpu")
    scores = pq.read_table(run / "scores.parquet").to_pandas()
    judged = scores[scores.split == "test"].iloc[:8]
    test = ShardSet(str(views / "test"))
    files = []
    for number, payload in enumerate(test.read([s for s in range(len(test)) if test.key(s) in set(judged.key)])):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(payload)
    np.testing.assert_allclose(detector.score(files), judged.score, rtol=1e-6)


def test_two_processes(run_of_twenty_steps):
    """Two processes give the table of one."""
    one, two = (scores(run_of_twenty_steps("baselines", processes)) for processes in (1, 2))
    assert one.drop(columns="score").equals(two.drop(columns="score"))
    np.testing.assert_allclose(two.score, one.score, rtol=1e-5, atol=1e-5)


def test_features_cache(flags, tmp_path, monkeypatch):
    """Features are computed once for all detectors and later runs; only what is new is added."""
    taken = []
    features_of = NetworkDetector.features_of

    def counted(self, image_B3HW):
        taken.append(len(image_B3HW))
        return features_of(self, image_B3HW)

    monkeypatch.setattr(NetworkDetector, "features_of", counted)
    shared = [*flags, "--features", str(tmp_path / "features"), "--detectors", "K-extremes", "nearest neighbours"]
    main([*shared, "--out", str(tmp_path / "first")])
    fitted = 90 + results_of(tmp_path / "first")["held_out_known"]
    assert len(taken) == -(-fitted // 32) + -(-120 // 32)  # one pass, in full batches, for both detectors
    taken.clear()
    main([*shared, "--share", "0.5", "--out", str(tmp_path / "second")])
    assert taken == []
    assert (
        results_of(tmp_path / "first")["detectors"]["nearest neighbours pre"]
        == (results_of(tmp_path / "second")["detectors"]["nearest neighbours pre"])
    )
    main([*shared, "--test-limit", "150", "--out", str(tmp_path / "third")])
    assert 0 < sum(taken) <= 160


def test_table_over_runs(flags, tmp_path):
    """A table over several runs has a line for each detector, with its range."""
    for seed in (0, 1):
        one = [*flags, "--detectors", "K-extremes", "Mahalanobis", "--seed", str(seed)]
        main([*one, "--out", str(tmp_path / "runs" / f"s{seed}")])
    lines = table(read_results(tmp_path / "runs")).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["K-extremes pre", "Mahalanobis pre"]
    assert all(" .. " in line for line in lines[2:])


def test_rbf_kernel(flags, tmp_path, capsys):
    """Features with negative values get the RBF kernel, and the run says so."""
    vit = [
        "--network",
        "test_vit",
        "--image-size",
        "160",
        "--resize",
        "160",
        "--detectors",
        "KNFST",
        "--test-limit",
        "60",
    ]
    main([*flags, *vit, "--out", str(tmp_path / "run")])
    assert "negative values, so the kernel is RBF" in capsys.readouterr().out


def test_one_known_class(flags, tmp_path, capsys):
    """With one known class, what needs two is left out, and the run says so."""
    main([*flags[: flags.index("--known")], "--known", "bag", "--out", str(tmp_path / "run")])
    assert "OpenMax is left out: it tells known classes apart" in capsys.readouterr().out
    assert set(results_of(tmp_path / "run")["detectors"]) == {f"{name} pre" for name in ON_FEATURES}


def test_stop_and_resume(flags, tmp_path, monkeypatch):
    """A run that is asked to stop leaves, and goes on to the same bits."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*flags, "--detectors", "KNFST", "Mahalanobis"]
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
    "no such detector": (["--detectors", "forest"], "no detector forest; there are nearest neighbours"),
    "no such layer": (["--layer", "layer7"], "no layer 'layer7'; it has "),
    "fine-tuned on other classes": (
        ["--known", "bag", "dress", "--finetuned", "FINETUNED"],
        "has other classes than",
    ),
    "a percentile of 0": (["--threshold-percentile", "0"], "must be from 0.01 to 99.99"),
    "a network that gives NaN": (["--network", "BROKEN"], "weights that are NaN or infinite"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(flags, finetuned, tmp_path, capsys, mistake):
    further, says = MISTAKES[mistake]
    further = [str(finetuned) if word == "FINETUNED" else word for word in further]
    if "BROKEN" in further:
        state = load_network("test_resnet", pretrained=False).trunk.state_dict()
        state["layer4.0.conv1.weight"] = torch.full_like(state["layer4.0.conv1.weight"], torch.nan)
        torch.save(state, tmp_path / "broken.pth")
        further = ["--network", str(tmp_path / "broken.pth"), "--arch", "test_resnet"]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--out", str(tmp_path / "run"), *further])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and "Traceback" not in said


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_that_cannot_be_fitted(views, tmp_path, processes):
    """One detector that cannot be fitted is named, and loses neither the others nor the other processes."""
    given = ["--train", views / "train", "--test", views / "test", "--network", "test_resnet", "--no-pretrained"]
    given += ["--image-size", 32, "--resize", 32, "--known", "bag", "--train-limit", 1, "--test-limit", 60]
    some = ["--detectors", "nearest neighbours", "Mahalanobis", "K-extremes", "SVDD"]
    done = started("baselines.py", *given, *some, "--out", tmp_path / "run", processes=processes)
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "run")
    assert list(results["detectors"]) == ["nearest neighbours pre", "SVDD pre", "K-extremes pre"]
    assert "no covariance" in results["not_fitted"]["Mahalanobis pre"]
    assert "Mahalanobis pre is left out" in done.stdout
