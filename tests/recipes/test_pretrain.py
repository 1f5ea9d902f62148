"""Supervised pretraining from end to end, on a few pictures."""

import json
import subprocess
import threading

import numpy as np
import pytest
import torch

from bigtrain.data.shard_set import ShardSet
from bigtrain.models.architecture import Architecture
from bigtrain.models.classifier import Classifier
from bigtrain.models.load_network import load_network
from bigtrain.models.vit import ViT
from recipes import defend, pretrain
from tests.launching import ENVIRONMENT, command, run
from tests.runs import ask_to_stop, losses, results

TINY = ["--model", "vit_tiny_patch16_224", "--image-size", "32", "--patch-size", "8", "--depth", "2"]


@pytest.fixture
def flags(shards):
    return [
        *("--train", str(shards / "test"), *TINY, "--epochs", "1", "--batch", "100", "--warmup-epochs", "0"),
        *("--lr", "5e-4", "--log-every", "1", "--checkpoint-every", "4"),
    ]


def test_vit_as_teacher(flags, shards, tmp_path, small):
    """A pretrained ViT serves as a teacher of DEFEND."""
    pretrain.main([*flags, "--weights", "fp16", "--pool", "both", "--out", str(tmp_path / "teacher")])
    results = json.loads((tmp_path / "teacher" / "results.json").read_text())
    assert 0 < results["top1"] <= results["top5"] <= 1
    weights = tmp_path / "teacher" / "network.safetensors"
    assert load_network(str(weights)).architecture == Architecture("vit_tiny_patch16_224", 32, 8, 2)
    defend.main([*small, "--teacher", str(weights), "--no-tune", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.html").is_file()


def test_learns(flags, shards, tmp_path):
    """The loss falls, and the accuracy on all of the `--val` set is far above chance."""
    easy = ["--val", str(shards / "test"), "--epochs", "8", "--lr", "1e-3", "--depth", "1", "--crop-scale", "0.8", "1"]
    pretrain.main([*flags, *easy, "--out", str(tmp_path / "run")])
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.5
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["held_out_images"] == len(ShardSet(str(shards / "test")))
    assert results["top1"] > 0.4  # ten classes: chance is 0.1


def test_held_out(flags, shards, tmp_path, capsys):
    """Pictures held out of the training set are not trained on."""
    pretrain.main([*flags, "--validation-share", "0.2", "--out", str(tmp_path / "run")])
    held_out = json.loads((tmp_path / "run" / "results.json").read_text())["held_out_images"]
    assert 150 <= held_out <= 250
    assert f"pretrain: {1000 - held_out} images" in capsys.readouterr().out


def test_two_processes(run_of_twenty_steps):
    """Two processes have the losses of one, and hold out as many images."""
    one, two = (run_of_twenty_steps("pretrain", processes) for processes in (1, 2))
    assert len(losses(one)) == 20 and losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert results(one)["held_out_images"] == results(two)["held_out_images"]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 1)])
def test_stop_and_resume(flags, tmp_path, processes, workers):
    """A run that is stopped in mid-epoch goes on to the same bits, with one process and with two."""
    further = "--epochs 2 --depth 1 --ema 0.9 --drop-path 0.5 --accumulate 2"
    flags = [*flags, *further.split(), "--workers", workers]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("pretrain.py", *flags, "--out", whole, processes=processes).returncode == 0
    threading.Thread(target=ask_to_stop, args=(stopped, 2), daemon=True).start()
    assert run("pretrain.py", *flags, "--out", stopped, processes=processes).returncode != 0
    assert 2 <= json.loads((stopped / "stopped.json").read_text())["step"] < 20
    done = run("pretrain.py", *flags, "--out", stopped, processes=processes)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    assert (stopped / "network.safetensors").read_bytes() == (whole / "network.safetensors").read_bytes()
    assert losses(stopped) == losses(whole) and len(losses(whole)) == 20


def test_pool_both():
    """A classifier may see the mean of the patches beside the class token."""
    torch.manual_seed(0)
    vit = ViT(Architecture("vit_tiny_patch16_224", 32, 8, 1).build())
    images = torch.randn(2, 3, 32, 32)
    model = Classifier(vit, 3, "both")
    torch.nn.init.normal_(model.head.weight)
    (seen,) = vit(images)
    features = torch.cat([seen.class_BD, seen.tokens_BND.mean(dim=1)], dim=1)
    assert torch.allclose(model(images), features @ model.head.weight.T)


CNN = ["--model", "test_resnet", "--image-size", "32", "--batch", "50", "--epochs", "2", "--warmup-epochs", "0"]


def test_finetune_known(shards, tmp_path, capsys):
    """A CNN is trained and then fine-tuned on some of the classes, its batch norm frozen."""
    train, trunk, tuned = str(shards / "train"), tmp_path / "trunk", tmp_path / "tuned"
    pretrain.main(["--train", train, *CNN, "--log-every", "1", "--out", str(trunk)])
    found = losses(trunk)
    assert len(found) == 2 * (2855 // 50) and np.mean(found[-10:]) < np.mean(found[:10]) - 0.3
    weights = trunk / "network.safetensors"
    assert len(load_network(str(weights)).classes["classes"]) == 10
    given = ["--model", str(weights), "--known", "bag", "coat", "--batch-norm", "frozen", "--no-mirror"]
    pretrain.main(["--train", train, *CNN, *given, "--lr", "1e-4", "--out", str(tuned)])
    network = load_network(str(tuned / "network.safetensors"))
    assert network.classes["classes"] == ("bag", "coat")
    held_out = json.loads((tuned / "results.json").read_text())["held_out_images"]
    assert f"pretrain: {600 - held_out} images of 2 classes" in capsys.readouterr().out
    before, after = load_network(str(weights)).trunk.state_dict(), network.trunk.state_dict()
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])
    assert not torch.equal(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])


def test_vit_network_file(flags, shards, tmp_path):
    """A ViT's `network.safetensors` has its trunk and its classifier too."""
    pretrain.main([*flags, "--out", str(tmp_path / "run")])
    network = load_network(str(tmp_path / "run" / "network.safetensors"))
    vit = network.vit
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.backbone(images), vit(images)[0].class_BD, atol=1e-5, rtol=1e-4)
    assert network.heads["classes"].weight.shape == (10, 192)


MISTAKES = {
    "both sides": (["--known", "bag", "--novel", "coat"], "both of --known and --novel given"),
    "tokens of a network without": (["--pool", "both"], "--pool both is about a ViT's tokens"),
    "pictures too small": (["--model", "alexnet"], "does not take pictures of 32 pixels"),
    "a patch of a network without": (["--patch-size", "8"], "settings of a vit_*"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(shards, tmp_path, capsys, mistake):
    """A mistake gives a one-sentence error and leaves no files."""
    further, says = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--train", str(shards / "train"), *CNN, *further, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_held_out(flags, tmp_path, capsys):
    """A run that would hold nothing out is refused before training."""
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*flags, "--validation-share", "0", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "--val SHARDS" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_train_and_out_are_needed(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main([])
    assert stop.value.code == 2 and "--train SHARDS and --out FOLDER are needed" in capsys.readouterr().err


def test_tracker(flags, tmp_path):
    """Figures and settings also go to one of Accelerate's trackers."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    environment = {**ENVIRONMENT, "WANDB_MODE": "offline"}
    done = subprocess.run(
        command("pretrain.py", *flags, "--trackers", "wandb", "--out", run),
        capture_output=True, text=True, env=environment, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = run.glob("wandb/offline-run-*/*.wandb")
    written = record.read_bytes()
    for what in (b"pretrain/loss", b"pretrain/gradient_norm", b"label_smoothing"):
        assert what in written


def test_missing_tracker(flags, tmp_path, capsys, monkeypatch):
    """A tracker that is not installed is refused, with the command that installs it."""
    monkeypatch.setattr("bigtrain.runtime.trackers.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*flags, "--trackers", "mlflow", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "uv sync --extra mlflow" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
