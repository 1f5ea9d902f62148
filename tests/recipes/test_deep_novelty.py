"""Deep novelty from end to end, on a few pictures and a tiny network."""

import json
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import bigtrain
from bigtrain.data.protocol import Protocol, halved
from bigtrain.data.shard_set import ShardSet
from bigtrain.methods.deep_novelty.checks import shared_classes
from bigtrain.models.load_network import load_network
from recipes.deep_novelty import main
from tests.fixtures import REFERENCE
from tests.launching import run as started
from tests.runs import ask_to_stop, losses, scores
from tests.runs import results as results_of


@pytest.fixture
def flags(views):
    given = {
        "train": views / "train", "test": views / "test", "reference": views / "reference", "network": "test_resnet",
        "image-size": 32, "resize": 36, "steps": 6, "batch": 8, "reference-batch": 4, "lr": 0.01, "score-batch": 32,
        "test-limit": 120, "train-limit": 100, "filter-images": 40, "checkpoint-every": 2, "log-every": 1,
    }  # fmt: skip
    return [
        *(part for name, value in given.items() for part in (f"--{name}", str(value))),
        *("--no-pretrained", "--known", "ankle_boot", "bag", "coat"),
    ]


def test_end_to_end(flags, views, tmp_path, capsys):
    """A run leaves figures of both kinds, a detector that gives its scores, and the page of filters."""
    run = tmp_path / "run"
    main([*flags, "--out", str(run)])
    results = results_of(run)
    assert results["method"] == "deep novelty" and sorted(results["novel"]) == ["dress", "pullover", "trouser"]
    assert 0 <= results["oscr"]["value"] <= results["closed_set_accuracy"]["value"] <= 1
    assert set(results["comparisons"]) == {
        "nearest neighbour on pixels", "nearest neighbour on features of the given network"
    }  # fmt: skip
    scores = pq.read_table(run / "scores.parquet").to_pandas()
    held_out, threshold = scores[scores.split == "held_out"], results["threshold"]["value"]
    assert (held_out.score > threshold).mean() <= 0.05 < (held_out.score >= threshold).mean()
    judged = scores[scores.split == "test"].iloc[:20]
    test = ShardSet(str(views / "test"))
    sample_of = {test.key(s): s for s in range(len(test))}
    detector = bigtrain.load_detector(run / "detector", device="cpu")
    payloads = test.read([sample_of[key] for key in judged.key])
    files = [tmp_path / f"{n}.png" for n in range(20)]
    for file, payload in zip(files, payloads, strict=True):
        file.write_bytes(payload)
    np.testing.assert_allclose(detector.score(files), judged.score, rtol=1e-6)
    network = load_network(str(run / "network.safetensors"))
    assert dict(network.classes) == {"known": ("ankle_boot", "bag", "coat"), "reference": tuple(REFERENCE)}
    page = (run / "filters.html").read_text()
    assert "globally negative" in page and page.count("<figure") >= 3 * 3 * 6 and "://" not in page
    main([*flags, "--out", str(run)])
    assert "this run is finished" in capsys.readouterr().out


ABLATION = {
    "one branch": ["--branches", "one", "--membership-weight", "0"],
    "one branch and membership": ["--branches", "one"],
    "two branches": ["--membership-weight", "0"],
    "Finetune(c+C)": ["--branches", "joint"],
    "the authors' code": ["--variant", "author_code"],
}


@pytest.mark.parametrize("case", ABLATION)
def test_ablation(flags, tmp_path, case):
    """Every row of the ablation in section 5.4 is a matter of settings."""
    further = ABLATION[case]
    if "one" in further:
        place = flags.index("--reference")
        flags = flags[:place] + flags[place + 2 :]
    main([*flags, *further, "--steps", "2", "--out", str(tmp_path / "run")])
    assert results_of(tmp_path / "run")["auroc"]["value"] > 0
    heads = {"known"} if "one" in further else {"known", "reference"}
    assert set(load_network(str(tmp_path / "run" / "network.safetensors")).heads) == heads


def test_the_first_loss_is_eq_4_by_hand(flags, tmp_path):
    """With heads of zeros every softmax is uniform and every sigmoid 1/2: CE = log C, membership = 5/4 + 1/4."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from torch import nn; nn.init.normal_ = lambda weight, **_: nn.init.zeros_(weight)\n"
        "from recipes.deep_novelty import main; main(sys.argv[1:])"
    )
    further = ["--steps", "1", "--ce-weight", "3", "--membership-weight", "2", "--out", tmp_path / "run"]
    done = started(script, *flags, *further)
    assert done.returncode == 0, done.stderr
    by_hand = np.log(3) + 3 * np.log(3) + 2 * 1.5
    assert losses(tmp_path / "run") == pytest.approx([by_hand], abs=1e-5)


def test_epochs(flags, tmp_path):
    """Epochs are passes over the known images."""
    place = flags.index("--steps")
    main([*flags[:place], *flags[place + 2 :], "--epochs", "2", "--out", str(tmp_path / "run")])
    known = sum(1 for row in pq.read_table(tmp_path / "run" / "scores.parquet").to_pylist() if row["split"] == "test")
    assert known == 120 and len(losses(tmp_path / "run")) == 2 * -(-100 // 8)


@pytest.mark.parametrize("launch", ["DDP", "ZeRO-2"])
def test_two_processes(twenty_steps, run_of_twenty_steps, tmp_path, launch):
    """Two processes have the losses and scores of one, under DDP and under ZeRO-2."""
    one, two = run_of_twenty_steps("deep_novelty", 1), tmp_path / "two"
    if launch == "DDP":
        two = run_of_twenty_steps("deep_novelty", 2)
    else:
        done = started("deep_novelty.py", *twenty_steps["deep_novelty"], "--out", two, processes=2, config="zero2")
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(one)) == 20 and losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert scores(one).key.tolist() == scores(two).key.tolist()
    np.testing.assert_allclose(scores(two).score, scores(one).score, atol=1e-4)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 1)])
def test_stop_and_resume(flags, tmp_path, processes, workers):
    """A run that is stopped goes on to the same bits, with one process and with two."""
    flags = [*flags, "--steps", "30", "--workers", workers, "--accumulate", "2", "--checkpoint-every", "10"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert started("deep_novelty.py", *flags, "--out", whole, processes=processes).returncode == 0
    threading.Thread(target=ask_to_stop, args=(stopped, 3), daemon=True).start()
    assert started("deep_novelty.py", *flags, "--out", stopped, processes=processes).returncode != 0
    assert 3 <= json.loads((stopped / "stopped.json").read_text())["step"] < 30
    done = started("deep_novelty.py", *flags, "--out", stopped, processes=processes)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    for file in ("network.safetensors", "scores.parquet"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes()
    assert losses(stopped) == losses(whole) and len(losses(whole)) == 30


def test_batch_norm_is_kept_or_trained(flags, tmp_path):
    kept, trained = tmp_path / "kept", tmp_path / "trained"
    main([*flags, "--out", str(kept)])
    main([*flags, "--batch-norm", "trained", "--out", str(trained)])
    means = [
        load_network(str(run / "network.safetensors")).trunk.state_dict()["bn1.running_mean"] for run in (kept, trained)
    ]
    assert not means[0].any() and means[1].any()
    done = started("deep_novelty.py", *flags, "--batch-norm", "trained", "--out", tmp_path / "two", processes=2)
    assert (
        done.returncode != 0
        and "--batch-norm frozen" in done.stderr
        and "Traceback (most" not in done.stderr.split("deep_novelty.py: error")[0]
    )


def test_one_set_for_both_is_halved(views, flags, tmp_path):
    place = flags.index("--test")
    alone = flags[:place] + flags[place + 2 :]
    known = alone.index("--known")
    main(
        [
            *alone[:known],
            "--no-pretrained",
            "--protocol",
            "first-half",
            "--test-limit",
            "0",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    results = results_of(tmp_path / "run")
    assert results["known"] == ["ankle_boot", "bag", "coat"]
    train = ShardSet(str(views / "train"))
    fitted_N, test_N = halved(Protocol(("ankle_boot", "bag", "coat"), ("dress", "pullover", "trouser")), train, seed=0)
    assert results["counts"]["known"] + results["counts"]["novel"] == len(test_N) == len(train) - len(fitted_N)


def test_shared_classes():
    """Classes in both sets are found by name and by synset."""
    reference = ["n02085620", "n02123045", "tench"]  # Chihuahua; tabby, tabby cat
    assert shared_classes(["Chihuahua", "Tabby_cat", "emu", "tench"], reference) == [
        ("Chihuahua", "n02085620"), ("Tabby_cat", "n02123045"), ("tench", "tench")
    ]  # fmt: skip


def test_overlap_warning(flags, shards, views, tmp_path, capsys):
    """A reference set that shows known or novel classes is warned of, with the known ones' names."""
    main(
        [
            *flags,
            "--train",
            str(views / "test"),
            "--test",
            str(views / "test"),
            "--reference",
            str(shards / "train"),
            "--out",
            str(tmp_path / "run"),
        ]
    )
    said = capsys.readouterr().out
    assert "warning: 3 known classes are reference classes too" in said and "ankle_boot, bag, coat" in said
    assert "warning: 3 novel classes are reference classes too" in said and "figures are too good" in said


MISTAKES = {
    "one known class": (["--known", "bag"], "needs at least 2; 1 was given (bag)"),
    "the reference is the known set": (["--reference", "TRAIN"], "the reference data set must show other things"),
    "no reference": (["--reference", ""], "--reference SHARDS is needed"),
    "a reference of no use": (["--branches", "one"], "of no use with --branches one"),
    "a percentile of 100": (["--threshold-percentile", "100"], "must be from 0.01 to 99.99"),
    "a percentile below 0": (["--threshold-percentile", "-1"], "must be from 0.01 to 99.99"),
    "steps and epochs": (["--epochs", "2"], "were both given: give only one"),
    "a view larger than the picture": (["--image-size", "64"], "smaller than --image-size 64"),
    "a variant without effect": (["--variant", "author_code", "--branches", "joint"], "leave it out"),
    "a batch that does not divide": (["--accumulate", "3"], "--accumulate 3 does not divide"),
    "a class without images": (["--train-limit", "2"], "known classes have no image to train on"),
    "pictures too small": (["--network", "alexnet"], "does not take pictures of 32 pixels"),
    "no such network": (["--network", "resnet5000"], "timm has no model 'resnet5000'"),
    "trained statistics of parts": (["--batch-norm", "trained", "--accumulate", "2"], "--accumulate would change"),
    "two ways to say what is known": (["--protocol", "first-half"], "leave --known and --novel out"),
    "an order without effect": (["--order", "folder"], "with --protocol first-half alone"),
    "an order of no manifest": (
        ["--known", "--protocol", "first-half", "--order", "folder"],
        "the manifest keeps no order of folders for 6 of the 6 classes",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(flags, views, tmp_path, capsys, mistake):
    """A mistake gives a one-sentence error and leaves no files."""
    further, says = MISTAKES[mistake]
    further = [str(views / "train") if word == "TRAIN" else word for word in further]
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--out", str(tmp_path / "run"), *further])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "pixels", "width"), [("vgg16", 32, 4096), ("alexnet", 64, 4096), ("vit_tiny_patch16_224", 32, 192)]
)
def test_vgg_alexnet_vit(flags, tmp_path, name, pixels, width):
    """The paper's own networks, VGG-16 and AlexNet, run, and so does a ViT."""
    further = ["--network", name, "--image-size", pixels, "--resize", pixels, "--steps", "1", "--train-limit", "40"]
    main([*flags, *map(str, further), "--test-limit", "30", "--filter-images", "0", "--out", str(tmp_path / "run")])
    assert load_network(str(tmp_path / "run" / "network.safetensors")).heads["known"].weight.shape == (3, width)
    assert torch.isfinite(torch.tensor(losses(tmp_path / "run"))).all()
