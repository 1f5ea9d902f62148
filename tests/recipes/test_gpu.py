"""On a GPU: every precision trains, stops, goes on to the same bits, and leaves the detector that was judged."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import bigtrain
from tests.launching import ENVIRONMENT, ON_GPU, ROOT, command
from tests.runs import ask_to_stop, judged_images


def launched(recipe, *flags, environment):
    """As a user's command: a process that has been forked may not use CUDA."""
    return subprocess.run(command(recipe, *flags), capture_output=True, text=True, env=environment, timeout=300)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_defend(small, tmp_path, precision):
    """DEFEND stopped on a GPU goes on to the same bits, and its detector gives the scores of the run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = [*small, "--precision", precision, "--distil-epochs", "10", "--drop-path", "0.1", "--workers", "1"]
    assert launched("defend.py", *flags, "--out", whole, environment=ON_GPU).returncode == 0
    threading.Thread(target=ask_to_stop, args=(run, 6), daemon=True).start()
    assert launched("defend.py", *flags, "--out", run, environment=ON_GPU).returncode == 85
    done = launched("defend.py", *flags, "--out", run, environment=ON_GPU)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    assert "on cuda" in done.stdout and f"precision {precision}" in done.stdout
    rows = [json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    assert (last["stage"], last["step"]) == ("distil", 40) and last["memory_gib"] > 0
    assert precision == "fp16" or not any(row.get("event") == "step skipped" for row in rows)
    judged, images = judged_images(run)
    detector = bigtrain.load_detector(run / "detector", device="cuda")
    assert detector.score(images).tolist() == judged["score"].tolist()
    for file in ("teacher.safetensors", "student.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deep_novelty(views, tmp_path, precision):
    """Deep novelty with trained batch norm, stopped on a GPU, goes on to the same bits."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = ["--train", views / "train", "--test", views / "test", "--reference", views / "reference"]
    flags += ["--network", "resnet18", "--no-pretrained", "--image-size", "64", "--resize", "72", "--steps", "40"]
    flags += ["--known", "ankle_boot", "bag", "coat", "--batch-norm", "trained", "--precision", precision]
    flags += ["--test-limit", "120", "--log-every", "1", "--checkpoint-every", "10", "--workers", "1"]
    assert launched("deep_novelty.py", *flags, "--out", whole, environment=ON_GPU).returncode == 0
    threading.Thread(target=ask_to_stop, args=(run, 6), daemon=True).start()
    assert launched("deep_novelty.py", *flags, "--out", run, environment=ON_GPU).returncode == 85
    done = launched("deep_novelty.py", *flags, "--out", run, environment=ON_GPU)
    assert done.returncode == 0 and "on cuda" in done.stdout and f"precision {precision}" in done.stdout, done.stderr
    for file in ("network.safetensors", "scores.parquet"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_signatures(views, tmp_path):
    """The mean features behind the signatures are the same on a GPU as on the CPU."""
    flags = ["--train", views / "train", "--test", views / "test", "--network", "resnet18", "--no-pretrained"]
    flags += ["--image-size", "64", "--resize", "64", "--known", "ankle_boot", "bag", "coat", "--precision", "fp32"]
    flags += ["--test-limit", "120"]
    for name, environment in (("gpu", ON_GPU), ("cpu", ENVIRONMENT)):
        done = launched("signatures.py", *flags, "--out", tmp_path / name, environment=environment)
        assert done.returncode == 0, done.stderr
    means = [bigtrain.load_detector(tmp_path / n / "detector", device="cpu").detector.mean_CD_ for n in ("gpu", "cpu")]
    torch.testing.assert_close(*map(torch.from_numpy, means), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "fp32"],
        ["--precision", "bf16", "--lora-rank", "4"],
        # rotary positions: timm's own blocks on each view
        ["--precision", "bf16", "--network", "eva02_tiny_patch14_224", "--no-pretrained", "--image-size", "56",
         "--crop-size", "28", "--lora-rank", "4"],
        # relative positions: attention with a bias
        ["--precision", "fp16", "--network", "vit_relpos_small_patch16_224", "--no-pretrained", "--image-size", "64",
         "--crop-size", "64"],
    ],
)  # fmt: skip
def test_tune(shards, teacher, tmp_path, flags):
    """Tuning stopped on a GPU goes on to the same bits and looks, for each kind of blocks."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = [
        "--train", shards / "test", "--network", teacher, "--image-size", "32", "--crop-size", "16", "--crops", "2",
        "--train-limit", "240", "--tune-epochs", "1", "--tune-batch", "6", "--guard-images", "40",
        "--checkpoint-every", "5", "--log-every", "1", "--guard-fall", "1", *flags,
    ]  # fmt: skip
    assert launched("tune.py", *flags, "--out", whole, environment=ON_GPU).returncode == 0
    threading.Thread(target=ask_to_stop, args=(run, 6), daemon=True).start()
    assert launched("tune.py", *flags, "--out", run, environment=ON_GPU).returncode == 85
    done = launched("tune.py", *flags, "--out", run, environment=ON_GPU)
    assert done.returncode == 0 and "on cuda" in done.stdout, done.stderr
    for file in ("teacher.safetensors", "guard.jsonl"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_distil(shards, teacher, tmp_path, precision):
    """Distillation of features on a GPU, with cached targets and without, ends with its figures."""
    flags = [
        "--train", shards / "test", "--teachers", teacher, "--model", "vit_tiny_patch16_224", "--patch-size", "8",
        "--depth", "2", "--image-size", "32", "--train-limit", "48", "--epochs", "2", "--batch", "12",
        "--guard-images", "40", "--precision", precision,
    ]  # fmt: skip
    for name, further in (("computed", []), ("cached", ["--cache-targets"])):
        done = launched("distil.py", *flags, *further, "--out", tmp_path / name, environment=ON_GPU)
        assert done.returncode == 0 and "on cuda" in done.stdout, done.stderr
        assert json.loads((tmp_path / name / "results.json").read_text())["figures"]["student"]["images"] == 40


WATCHED = """
import sys, torch
from importlib import import_module
from bigtrain.training.stage import Stage

steps_of = Stage.__iter__

def watched(self):
    for number, step in enumerate(steps_of(self)):  # the first ones set up kernels; at the last a guard looks
        torch.cuda.set_sync_debug_mode("error" if 3 <= number and self.step + 1 < self.steps else "default")
        yield step
        self.watched = number
    torch.cuda.set_sync_debug_mode("default")
    print(f"watched {self.name} to step {self.step}", flush=True)

Stage.__iter__ = watched
if __name__ == "__main__":
    import_module(f"recipes.{sys.argv.pop(1)}").main()
"""


@pytest.mark.parametrize("recipe", ["defend", "tune", "pretrain", "deep_novelty", "panda", "distil"])
def test_steps_do_not_wait(recipe, small, views, shards, teacher, tmp_path, recipe_flags):
    """From the fourth step on no step of a recipe waits for the device."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    flags = recipe_flags[recipe]
    line = [sys.executable, script, recipe, *flags, "--precision", "bf16", "--workers", "1", "--log-every", "2"]
    line += ["--checkpoint-every", "1000", "--compile", "off", "--out", tmp_path / "run"]
    environment = {**ON_GPU, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0 and "watched" in done.stdout, done.stderr[-3000:]


@pytest.fixture
def recipe_flags(small, views, shards, teacher):
    """Short runs of every recipe that trains."""
    network = ["--network", "resnet18", "--no-pretrained", "--image-size", "64", "--resize", "72"]
    known = ["--train", views / "train", "--test", views / "test", "--test-limit", "60"]
    tuned = ["--image-size", "32", "--crop-size", "16", "--crops", "2", "--train-limit", "120", "--tune-batch", "6"]
    vit = ["--model", "vit_tiny_patch16_224", "--patch-size", "8", "--depth", "2", "--image-size", "32"]
    return {
        "defend": [*small, "--distil-epochs", "4"],
        "tune": ["--train", shards / "test", "--network", teacher, *tuned, "--tune-epochs", "1", "--guard-images", "40",
                 "--guard-every", "1000", "--guard-fall", "1"],
        "pretrain": ["--train", shards / "train", "--val", shards / "test", *vit, "--epochs", "1", "--batch", "100"],
        "deep_novelty": [*known, *network, "--known", "bag", "coat", "--branches", "one", "--steps", "12"],
        "panda": [*known, *network, "--known", "bag", "--epochs", "6", "--batch", "8"],
        "distil": ["--train", shards / "test", "--teachers", teacher, *vit, "--train-limit", "96", "--epochs", "1",
                   "--batch", "12", "--guard-images", "40"],
    }  # fmt: skip


def test_compiled(small, tmp_path):
    """Compiled networks train to the same losses but for rounding, and are judged as they were saved."""
    rows = []
    for name in ("off", "on"):
        flags = [*small, "--precision", "fp32", "--distil-epochs", "2", "--compile", name, "--out", tmp_path / name]
        done = launched("defend.py", *flags, environment=ON_GPU)
        assert done.returncode == 0, done.stderr
        rows.append([json.loads(row) for row in (tmp_path / name / "log.jsonl").read_text().splitlines()])
    plain, compiled = ([row["loss"] for row in part if "loss" in row] for part in rows)
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert any(row.get("event") == "compiled" for row in rows[1])
    judged, images = judged_images(tmp_path / "on")
    detector = bigtrain.load_detector(tmp_path / "on" / "detector", device="cuda")
    assert detector.score(images).tolist() == judged["score"].tolist()
