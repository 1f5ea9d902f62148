"""What comes with bigtrain by name, and what a sweep looks at before it begins."""

import subprocess
from pathlib import Path

import pytest

from bigtrain.data.protocol import expand
from slurm.ask_recipe import missing_inputs
from slurm.job_parameters import watched
from slurm.shipped import shipped, shipped_names
from slurm.slurm_cli import main
from slurm.sweep import name_of, plan


@pytest.mark.parametrize(
    ("given", "kind", "end"),
    [
        ("defend", "recipe", "recipes/defend.py"),
        ("recipes/defend.py", "recipe", "recipes/defend.py"),
        ("coco_uniclass", "sweep", "slurm/sweeps/coco_uniclass.toml"),
        ("slurm/clusters/a100x8.toml", "cluster", "slurm/clusters/a100x8.toml"),
    ],
)
def test_by_name(given, kind, end, tmp_path, monkeypatch):
    """A name finds what is installed, from any folder; a file that is there comes first."""
    monkeypatch.chdir(tmp_path)
    assert shipped(Path(given), kind).as_posix().endswith(end)
    assert Path(given).stem in shipped_names(kind)
    (tmp_path / given).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / given).touch()
    assert shipped(Path(given), kind) == Path(given)


def test_unknown_names(tmp_path, monkeypatch, capsys):
    """A name that is neither is answered with those that there are."""
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "defen", "--local"]) == 2
    assert "one of baselines, deep_novelty, defend" in capsys.readouterr().err
    assert main(["sweep", "nothing", "--dry-run"]) == 2
    assert "coco_uniclass" in capsys.readouterr().err
    assert shipped(Path("../defend.py"), "recipe") == Path("../defend.py")


def test_short_names():
    """Of a path the end alone becomes part of a run's name."""
    assert name_of({"teacher": "/data/very/long/vits/teacher.safetensors", "seed": 0}) == "teachervits_teacher-s0"
    assert name_of({"dataset": "data/shards/cifar10"}) == "cifar10"
    assert name_of({"known": "a/b", "mask_ratio": 0.5}) == "b-mask_ratio0.5"


def test_missing_inputs(tmp_path):
    """An axis value that is a missing file or set is found before anything starts."""
    (tmp_path / "s.toml").write_text('recipe = "defend"\n[settings]\ntrain = "nowhere"\n')
    assert "train is 'nowhere' in the run run" in missing_inputs(plan(tmp_path / "s.toml"))[0]
    (tmp_path / "s.toml").write_text('recipe = "defend"\n[axes]\nteacher = ["resnet18", "gone.pth"]\n')
    (sentence,) = missing_inputs(plan(tmp_path / "s.toml"))
    assert "teacher is 'gone.pth' in the run teachergone.pth, and there is no such file" in sentence
    assert main(["sweep", str(tmp_path / "s.toml"), "--local"]) == 2


def test_one_class_takes_its_turn():
    """classes = ["bag"] is the one class that is known in turn; what is novel, the recipe's data say."""
    assert [protocol.known for protocol in expand("uni-class", ["bag"])] == [("bag",)]
    assert [protocol.novel for protocol in expand("all-vs-one", ["bag"])] == [("bag",)]


SETUP = [
    "export A='b c'",
    "",
    "test -f ~/.nothing && source ~/.nothing",
    "true;  # a note",
    "if false; then",
    "x",
    "fi",
]


def test_failing_setup_line():
    """A line of setup that fails ends the job, with the line in a sentence; conditions, notes and blocks are shell."""

    def done(*lines):
        script = "\n".join([*watched([*SETUP, *lines]), "false", "echo reached"])
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)

    assert done("true").stdout == "reached\n"
    failed = done("cd /nowhere")
    assert failed.returncode == 2 and not failed.stdout
    assert "this line of setup failed: cd /nowhere" in failed.stderr
