"""--resume-from: a run that begins with the state of another ends with its bits; what is no such state is refused."""

import json
import shutil

import pytest
import torch

from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network
from bigtrain.models.vit import ViT
from tests.launching import run as started

RESULTS = ("teacher.safetensors", "student.safetensors", "scores.parquet")


@pytest.fixture(scope="module")
def whole(finished):
    """A finished run that has kept the checkpoints of every second step."""
    steps = [path.name for path in sorted(finished.glob("checkpoints/distil/*"))]
    assert steps == [f"step-{n:06d}" for n in (2, 4, 6, 8)]
    return finished


@pytest.fixture(scope="module")
def killed(whole, tmp_path_factory):
    """The same run, as it was while it trained the student."""
    run = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(whole, run)
    for name in ("results.json", "student.safetensors", "scores.parquet"):
        (run / name).unlink()
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / "distil" / f"step-{step:06d}")
    return run


@pytest.mark.parametrize(
    ("source", "continues"),
    [
        ("whole/checkpoints/tune/step-000002", "tune/step-000002"),
        ("whole/checkpoints/distil/step-000004", "distil/step-000004"),
        ("killed", "distil/step-000004"),
        ("whole", None),
    ],
)
def test_resume_from(small, whole, killed, tmp_path, source, continues):
    """A new run goes on from another's state to its bits, and leaves the other as it was."""
    run, name, path = tmp_path / "new", *source.partition("/")[::2]
    source = {"whole": whole, "killed": killed}[name] / path
    before = sorted(source.rglob("*"))
    done = started("defend.py", *small, "--resume-from", source, "--out", run)
    assert done.returncode == 0, done.stderr
    if continues:
        assert f"continuing from {run / 'checkpoints' / continues}" in done.stdout
    for file in RESULTS:
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert sorted(source.rglob("*")) == before
    again = started("defend.py", *small, "--resume-from", source, "--out", run)
    assert again.returncode == 0 and "this run is finished" in again.stdout


def refused(small, run, *flags):
    done = started("defend.py", *small, *flags, "--out", run)
    assert done.returncode == 2, done.stderr
    (error,) = done.stderr.splitlines()
    return error


def test_other_settings(small, whole, tmp_path):
    """Other settings than the source's are refused by name."""
    error = refused(small, tmp_path / "new", "--distil-lr", "2e-3", "--resume-from", whole)
    assert "holds a run with other settings: distil_lr (0.001 there, 0.002 here)" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["pictures", "checkpoints", "nowhere"])
def test_what_is_no_run_is_refused(small, whole, shards, tmp_path, what):
    source = {"pictures": shards / "train", "checkpoints": whole / "checkpoints", "nowhere": tmp_path / "none"}[what]
    error = refused(small, tmp_path / "new", "--resume-from", source)
    assert f"--resume-from {source} is not a run: name a run's folder" in error
    assert not (tmp_path / "new").exists()


def test_unreadable_config(small, whole, tmp_path):
    """A run whose settings cannot be read is refused."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{")
    error = refused(small, tmp_path / "new", "--resume-from", tmp_path / "old")
    assert "config.json cannot be read" in error


def test_other_network(small, teacher, tmp_path):
    """A checkpoint of another network is refused, with its shapes."""
    mine = tmp_path / "teacher.safetensors"
    shutil.copy(teacher, mine)
    flags = [*small, "--teacher", mine]
    assert started("defend.py", *flags, "--keep-every", 2, "--out", tmp_path / "old").returncode == 0
    torch.manual_seed(1)
    architecture = Architecture("vit_small_patch16_224", image_size=32, patch_size=8, depth=2)
    Network(ViT(architecture.build()), architecture, (0.5,) * 3, (0.5,) * 3).save(mine)
    source = tmp_path / "old" / "checkpoints" / "tune" / "step-000002"
    error = started("defend.py", *flags, "--resume-from", source, "--out", tmp_path / "new")
    assert error.returncode == 2 and "step-000002 is of another network: " in error.stderr
    assert ", 192" in error.stderr and ", 384" in error.stderr and "Traceback" not in error.stderr


def test_missing_setting(small, killed, tmp_path):
    """A run from before a setting existed counts as one with its default: another value is refused."""
    old = tmp_path / "old"
    shutil.copytree(killed, old)
    config = json.loads((old / "config.json").read_text())
    del config["settings"]["distil_batch"]
    (old / "config.json").write_text(json.dumps(config))
    error = refused(small, tmp_path / "new", "--resume-from", old)
    assert "distil_batch (64 there, 6 here)" in error
