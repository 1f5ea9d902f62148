"""Small real data for the recipes: shards of the embedded Fashion-MNIST sample, and a small random teacher."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from bigtrain.models.vit import Architecture, ViT
from bigtrain.models.weights import save_vit

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "recipes" / "presets" / "fashion" / "sample"
REFERENCE = ["sandal", "shirt", "sneaker"]
OTHERS = ["ankle_boot", "bag", "coat", "dress", "pullover", "trouser"]
ON_GPU = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
ON_GPU |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT = {**ON_GPU, "CUDA_VISIBLE_DEVICES": ""}  # what is said of bits and of 1e-5 is said of CPUs


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with the shard sets `train` and `test` of the sample, in shards of 500 images."""
    folder = tmp_path_factory.mktemp("fashion")
    for split in ("train", "test"):
        options = ["--root", SAMPLE, "--split", split, "--dataset", "fashion_mnist", "--out", folder / split]
        command = [sys.executable, "-m", "shards", "build", "mnist", *options, "--samples-per-shard", "500"]
        subprocess.run(list(map(str, command)), check=True, cwd=ROOT, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def views(shards, tmp_path_factory):
    """Views of the sample: `reference` shows three classes, `train` and `test` six others."""
    folder = tmp_path_factory.mktemp("views")
    for name, source, classes in (
        ("reference", "train", REFERENCE),
        ("train", "train", OTHERS),
        ("test", "test", OTHERS),
    ):
        line = [sys.executable, "-m", "shards", "split", shards / source, "--classes", *classes, "--out", folder / name]
        subprocess.run(list(map(str, line)), check=True, cwd=ROOT, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A ViT of 2 blocks x 192 for pictures of 32 pixels in patches of 8, with random weights."""
    torch.manual_seed(0)
    architecture = Architecture("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_vit(path, ViT(architecture.build()), architecture, mean=(0.5,) * 3, std=(0.5,) * 3)
    return path


@pytest.fixture(scope="session")
def small(shards, teacher):
    """Flags of a DEFEND run of a few seconds: 4 + 8 steps on 48 pictures, 120 to judge."""
    flags = {
        "train": shards / "train", "test": shards / "test", "teacher": teacher, "known": "ankle_boot",
        "image-size": 32, "crop-size": 16, "crops": 2, "train-limit": 48, "test-limit": 120,
        "tune-epochs": 1, "tune-batch": 12, "distil-epochs": 2, "distil-batch": 12, "distil-lr": 1e-3,
        "checkpoint-every": 1, "log-every": 1, "score-batch": 32,
    }  # fmt: skip
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """A CPU and one thread, as the launched runs have, for the same bits; undo what a recipe sets for its process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        with contextlib.suppress(Exception):
            state._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


def command(recipe, *flags):
    return [sys.executable, str(ROOT / "recipes" / recipe), *map(str, flags)]


def accelerate(config, processes, *flags, recipe="defend.py"):
    """The command that launches a recipe with a configuration of recipes/accelerate; run it in ENVIRONMENT."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launch += ["--config_file", ROOT / "recipes" / "accelerate" / f"{config}.yaml", "--num_processes", processes]
    return list(map(str, [*launch, ROOT / "recipes" / recipe, *flags]))


def launched(recipe, *flags, processes=1, environment=ENVIRONMENT):
    """Run a recipe as a user's command; with several processes over gloo."""
    line = command(recipe, *flags)
    if processes > 1:
        line = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            *line[1:],
        ]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
