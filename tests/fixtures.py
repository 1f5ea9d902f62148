"""Fixtures for every folder: small real data for the recipes, and finished runs that tests look at.

Shards of the embedded Fashion-MNIST sample, a small random teacher, and runs of them, made once for all test workers.
"""

import contextlib
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network
from bigtrain.models.vit import ViT
from shards.shards_cli import main as shards_command
from tests.launching import ROOT, run
from tests.made_once import made_once

SAMPLE = ROOT / "recipes" / "presets" / "fashion" / "sample"
REFERENCE = ["sandal", "shirt", "sneaker"]
OTHERS = ["ankle_boot", "bag", "coat", "dress", "pullover", "trouser"]


def shards_made(*line):
    """Run `bigtrain-shards`."""
    assert shards_command(list(map(str, line))) == 0


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with the shard sets `train` and `test` of the sample, in shards of 500 images."""

    def make(folder):
        for split in ("train", "test"):
            options = ["--root", SAMPLE, "--split", split, "--dataset", "fashion_mnist", "--out", folder / split]
            shards_made("build", "mnist", *options, "--samples-per-shard", "500", "--workers", "1")

    return made_once(tmp_path_factory, "fashion", make)


@pytest.fixture(scope="session")
def views(shards, tmp_path_factory):
    """Views of the sample: `reference` shows three classes, `train` and `test` six others."""

    def make(folder):
        for name, source, classes in (
            ("reference", "train", REFERENCE),
            ("train", "train", OTHERS),
            ("test", "test", OTHERS),
        ):
            shards_made("split", shards / source, "--classes", *classes, "--out", folder / name)

    return made_once(tmp_path_factory, "views", make)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A ViT of 2 blocks x 192 for pictures of 32 pixels in patches of 8, with random weights."""

    def make(folder):
        torch.manual_seed(0)
        architecture = Architecture("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2)
        half = (0.5,) * 3
        Network(ViT(architecture.build()), architecture, half, half).save(folder / "teacher.safetensors")

    return made_once(tmp_path_factory, "teacher", make) / "teacher.safetensors"


@pytest.fixture(scope="session")
def small(shards, teacher):
    """Flags of a DEFEND run of a few seconds: 4 + 8 steps on 24 pictures, 120 to judge."""
    flags = {
        "train": shards / "train", "test": shards / "test", "teacher": teacher, "known": "ankle_boot",
        "image-size": 32, "crop-size": 16, "crops": 2, "train-limit": 24, "test-limit": 120,
        "tune-epochs": 1, "tune-batch": 6, "distil-epochs": 2, "distil-batch": 6, "distil-lr": 1e-3,
        "checkpoint-every": 2, "log-every": 1, "score-batch": 32,
    }  # fmt: skip
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """A finished run of the small settings that has kept the checkpoints of every second step; what it said is in
    the file `said` beside it."""

    def make(folder):
        done = run("defend.py", *small, "--keep-every", 2, "--out", folder / "run")
        assert done.returncode == 0, done.stderr
        (folder / "said").write_text(done.stdout)

    return made_once(tmp_path_factory, "finished", make) / "run"


@pytest.fixture(scope="session")
def twenty_steps(shards, views, small):
    """Flags by recipe: 20 steps of each stage, and those that train nothing; the same at any number of processes."""
    # at low rates, so that another CPU's last bits do not grow beyond 1e-6
    many = "--train-limit 30 --tune-epochs 4 --distil-epochs 4 --drop-path 0 --checkpoint-every 100"
    rates = "--tune-lr 1e-6 --head-lr 1e-6 --distil-lr 1e-4"
    known = ["--known", "ankle_boot", "bag", "coat"]
    given = ["--train", views / "train", "--test", views / "test", "--network", "test_resnet", "--no-pretrained"]
    given += ["--image-size", 32, "--test-limit", 120, "--score-batch", 32]
    features = [*given, "--resize", 32, "--train-limit", 90, "--share", 0.2, *known]
    two_branches = ["--reference", views / "reference", "--reference-batch", 4, "--batch", 8, "--lr", 0.002]
    two_branches += ["--filter-images", 40]
    logged = ["--log-every", 1]
    vit = "--model vit_tiny_patch16_224 --image-size 32 --patch-size 8 --depth 2 --epochs 2 --batch 100 --drop-path 0"
    flags = {
        "defend": [*small, *many.split(), *rates.split()],
        "deep_novelty": [*given, "--resize", 36, "--train-limit", 100, *two_branches, "--steps", 20, *logged, *known],
        "pretrain": ["--train", shards / "test", *vit.split(), "--warmup-epochs", 0, "--lr", 5e-5, *logged],
        "signatures": [*features, "--neighbours-bank", 60],
        "baselines": [*features, "--local-neighbours", 40],
    }
    return {recipe: list(map(str, line)) for recipe, line in flags.items()}


@pytest.fixture(scope="session")
def run_of_twenty_steps(twenty_steps, tmp_path_factory):
    """run_of_twenty_steps(recipe, processes) -> the folder of such a run."""

    def made(recipe, processes):
        def make(folder):
            config = {1: "cpu", 2: "cpu2"}[processes]
            line = [*twenty_steps[recipe], "--out", folder / "run"]
            done = run(f"{recipe}.py", *line, processes=processes, config=config)
            assert done.returncode == 0, done.stderr
            assert f"{processes} process(es)" in done.stdout

        return made_once(tmp_path_factory, f"twenty steps of {recipe} in {processes}", make) / "run"

    return made


@pytest.fixture
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
