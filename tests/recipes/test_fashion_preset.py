"""The main job without arguments: the embedded sample and teacher, as a new user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.models.weights import load_vit
from recipes.presets.fashion.prepare import HERE
from tests.launching import ENVIRONMENT, ROOT


def first_command(folder, *flags):
    """The README's first command, in an empty folder of its own and without a network."""
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--quiet"]
    launch += ["--config_file", ROOT / "recipes" / "accelerate" / "one.yaml", ROOT / "recipes" / "defend.py"]
    line = list(map(str, [*launch, *flags]))
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=900, cwd=folder)


def test_first_command(tmp_path):
    """The README's first command works in an empty folder, on the data that comes with it."""
    done = first_command(tmp_path, "--tune-epochs", "1", "--distil-epochs", "1")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "preset fashion" in said[0] and not done.stderr, "the first line that is seen is ours"
    assert "AUROC" in said[-1] and "runs/fashion/report.html" in said[-1]
    results = json.loads((tmp_path / "runs" / "fashion" / "results.json").read_text())
    assert results["known"] == ["ankle_boot"]
    assert results["counts"] == {"known": 100, "novel": 900}


def test_embedded_teacher():
    """The embedded teacher is small and whole."""
    file = HERE / "teacher" / "teacher.safetensors"
    assert file.stat().st_size <= 6e6
    teacher = load_vit(str(file))
    assert len(teacher.vit.backbone.blocks) == 6 and teacher.vit.width == 192


@pytest.mark.slow
def test_auroc_over_seeds(tmp_path):
    """The first command reaches its AUROC in the mean over three seeds."""
    found = []
    for seed in "012":
        assert first_command(tmp_path, "--seed", seed, "--out", seed).returncode == 0
        found.append(json.loads((tmp_path / seed / "results.json").read_text())["auroc"]["value"])
    assert sum(found) / 3 >= 0.92
