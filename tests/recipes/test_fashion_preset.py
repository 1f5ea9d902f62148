"""The main job without arguments: the embedded sample and teacher, as a new user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.models.load_network import load_network
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
    """The embedded teacher is small and complete."""
    file = HERE / "teacher" / "teacher.safetensors"
    assert file.stat().st_size <= 6e6
    teacher = load_network(str(file))
    assert len(teacher.vit.backbone.blocks) == 6 and teacher.vit.width == 192


@pytest.mark.slow
def test_beats_plain_figures(tmp_path):
    """In the mean over three seeds the first command is above each plain figure, and above the authors' reading."""

    def auroc_of(folder, *flags):
        assert first_command(tmp_path, "--out", folder, *flags).returncode == 0
        results = json.loads((tmp_path / folder / "results.json").read_text())
        plain = {name: figures["auroc"]["value"] for name, figures in results["comparisons"].items()}
        return {"own": results["auroc"]["value"], **plain}

    runs = [auroc_of(seed, "--seed", seed) for seed in "012"]
    visible = [auroc_of(f"visible{seed}", "--seed", seed, "--predict", "visible")["own"] for seed in "012"]
    means = {name: sum(run[name] for run in runs) / 3 for name in runs[0]}
    assert means["own"] > sum(visible) / 3
    assert all(means["own"] > value for name, value in means.items() if name != "own")
