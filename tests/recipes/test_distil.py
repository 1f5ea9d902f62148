"""Distilling features from end to end, on a few pictures."""

import shutil
import threading

import pytest

from bigtrain.models.architecture import Architecture
from bigtrain.models.load_network import load_network
from recipes import defend, distil
from tests.launching import run
from tests.runs import ask_to_stop, losses, results

VIT = ["--model", "vit_tiny_patch16_224", "--patch-size", "8", "--depth", "2"]


@pytest.fixture
def flags(shards, teacher):
    """Flags of a run of 8 steps on 48 pictures, with 40 to look at."""
    flags = {
        "train": shards / "test", "image-size": 32, "train-limit": 48, "epochs": 2, "batch": 12, "guard-images": 40,
        "warmup-epochs": 0, "checkpoint-every": 2, "log-every": 1, "score-batch": 16, "lr": 3e-3,
    }  # fmt: skip
    return [*(part for name, value in flags.items() for part in (f"--{name}", str(value))), "--teachers", str(teacher)]


def test_vit_from_vit(flags, teacher, small, tmp_path, capsys):
    """The loss falls, the figures stand side by side, and the student serves as a teacher of DEFEND."""
    out = tmp_path / "run"
    other = shutil.copy(teacher, tmp_path / "other.safetensors")
    distil.main([*flags, *VIT, "--compare", str(other), "--epochs", "6", "--out", str(out)])
    found = losses(out)
    assert len(found) == 24 and sum(found[-4:]) < 0.8 * sum(found[:4])
    figures = results(out)["figures"]
    assert list(figures) == ["student", "random weights", str(teacher), str(other)]
    assert figures["student"]["images"] == 40 and "knn" in figures["student"]
    network = load_network(out / "network.safetensors")
    assert network.architecture == Architecture("vit_tiny_patch16_224", 32, 8, 2)
    defend.main([*small, "--teacher", str(out / "network.safetensors"), "--no-tune", "--out", str(tmp_path / "judged")])
    assert (tmp_path / "judged" / "report.html").is_file()


@pytest.mark.parametrize(
    ("teachers", "student"),
    [
        (["test_resnet", "test_convnext"], VIT),  # two CNNs, whose maps are of another grid
        (["TEACHER"], ["--model", "test_resnet"]),  # into a CNN, with batch norm
        (["vit_small_patch16_dinov3"], ["--model", "vit_tiny_patch16_dinov3_qkvb", "--depth", "2"]),
    ],
)
def test_any_to_any(flags, teacher, tmp_path, teachers, student):
    """Any network into any, several teachers at once."""
    teachers = [str(teacher) if name == "TEACHER" else name for name in teachers]
    further = ["--no-pretrained", "--teachers", *teachers, "--teacher-size", "32", "--image-size", "64"]
    distil.main([*flags[:-2], *further, *student, "--epochs", "1", "--out", str(tmp_path / "run")])
    assert len(losses(tmp_path / "run")) == 4
    assert set(results(tmp_path / "run")["figures"]) == {"student", "random weights", *teachers}
    assert load_network(tmp_path / "run" / "network.safetensors").report


def test_cached_targets(flags, tmp_path, capsys):
    """Targets that were computed in advance give the losses of those that are computed in each step."""
    whole = ["--crop-scale", "1", "1", "--no-mirror"]
    distil.main([*flags, *VIT, *whole, "--cache-targets", "--out", str(tmp_path / "cached")])
    assert not (tmp_path / "cached" / "targets").exists()  # they are large
    distil.main([*flags, *VIT, *whole, "--out", str(tmp_path / "computed")])
    assert losses(tmp_path / "cached")[0] == pytest.approx(losses(tmp_path / "computed")[0], abs=0.02)
    with pytest.raises(SystemExit):
        distil.main([*flags, *VIT, "--cache-targets", "--cache-gib", "0.0001", "--out", str(tmp_path / "none")])
    assert "raise it, lower --train-limit, or leave --cache-targets out" in capsys.readouterr().err


@pytest.mark.parametrize(("processes", "further"), [(1, ["--cache-targets"]), (2, [])])
def test_stop_and_resume(flags, tmp_path, processes, further):
    """A run that is stopped goes on to the same bits."""
    flags = [*flags, *VIT, "--ema", "0.9", *further]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("distil.py", *flags, "--out", whole, processes=processes).returncode == 0
    threading.Thread(target=ask_to_stop, args=(stopped, 2), daemon=True).start()
    assert run("distil.py", *flags, "--out", stopped, processes=processes).returncode != 0
    assert (stopped / "targets").is_dir() == ("--cache-targets" in further)
    done = run("distil.py", *flags, "--out", stopped, processes=processes)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    assert (stopped / "network.safetensors").read_bytes() == (whole / "network.safetensors").read_bytes()
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize("config", ["", "zero1"])
def test_two_processes(flags, tmp_path, config):
    """Two processes, under ZeRO too, have the losses of one."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*flags, "--lr", "3e-4"]
    assert run("distil.py", *flags, *VIT, "--out", one).returncode == 0
    done = run("distil.py", *flags, *VIT, "--out", two, processes=2, config=config)
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.parametrize("model", ["test_convnext", "vit_base_patch16_siglip_224"])
def test_unused_weights(flags, tmp_path, model):
    """Students with weights that no dense feature depends on train on several processes; it is said which they are."""
    further = ["--model", model, "--image-size", "64", "--epochs", "1", "--depth", "1" if "vit" in model else "0"]
    done = run("distil.py", *flags, *further, "--out", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr
    assert ("of the student stay random" in done.stdout) == ("siglip" in model)


MISTAKES = {
    "no such teacher": (["--teachers", "resnet5000"], "timm has no model 'resnet5000'"),
    "a network twice": (["--teachers", "resnet18", "--compare", "resnet18"], "name a network twice"),
    "no such file": (["--teachers", "none.safetensors"], "none.safetensors does not exist"),
    "no such student": (["--model", "vit_enormous"], "timm has no model 'vit_enormous'"),
    "no map": (["--teachers", "mixer_s32_224", "--no-pretrained", "--image-size", "224"], "gives no map of features"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(flags, tmp_path, capsys, mistake):
    """A mistake gives a one-sentence error and leaves no files."""
    further, says = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        distil.main([*flags[:-2], *VIT, *further, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()
