"""Tuning without labels from end to end, on a few pictures."""

import json
import threading
from types import SimpleNamespace

import pytest
import timm
import torch

from bigtrain.data.shard_set import ShardSet
from bigtrain.models.load_network import load_network
from bigtrain.training.read_unlabelled import read_unlabelled
from recipes import baselines, tune
from shards.shards_cli import main as shards_command
from tests.broken_pictures import with_broken_picture
from tests.launching import run
from tests.runs import ask_to_stop, events, losses, results


@pytest.fixture
def flags(shards, teacher):
    """Flags of a run of 8 steps on 48 pictures, with 40 to look at."""
    flags = {
        "train": shards / "test", "network": teacher, "image-size": 32, "crop-size": 16, "crops": 2,
        "train-limit": 48, "tune-epochs": 1, "tune-batch": 6, "guard-images": 40, "guard-every": 4,
        "checkpoint-every": 2, "log-every": 1, "score-batch": 16,
    }  # fmt: skip
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def looks(folder):
    return [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]


def test_tuned_network(flags, teacher, tmp_path, capsys):
    """The last block alone has changed; bigtrain and timm load what comes out alike; page and card are there."""
    out = tmp_path / "run"
    tune.main([*flags, "--tuned-blocks", "1", "--tune-lr", "1e-4", "--guard-fall", "1", "--save-as", "timm",
               "--out", str(out)])  # fmt: skip
    said = capsys.readouterr().out
    assert "20 prototypes" in said  # twice the ten classes
    assert [row["step"] for row in looks(out)] == [0, 4, 8]
    found = results(out)
    assert found["before"] == looks(out)[0] and found["after"] == looks(out)[-1] and found["stopped"] == ""
    assert {"rank", "spread", "pair_agreement", "token_rank", "knn", "linear_probe"} < set(found["before"])
    assert 0 < found["after"]["prototype_usage"] <= 1
    given, tuned = load_network(teacher), load_network(out / "teacher.safetensors")
    before, after = given.backbone.state_dict(), tuned.backbone.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("blocks.1.") for key in changed)
    theirs = timm.create_model(f"local-dir:{out / 'released'}", pretrained=True).eval()
    image_B3HW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image_B3HW), tuned.backbone(image_B3HW), rtol=1e-4, atol=1e-5)
    card = (out / "released" / "README.md").read_text()
    assert "tuned without labels" in card and "| find their other view, % |" in card and "| 8 |" in card
    page = (out / "report.html").read_text()
    assert all(title in page for title in ("Before and after", "Patch features", "Attention", "Nearest patches"))
    assert page.count("data:image/") > 6 * 6 and '<polyline class="curve' in page


def test_tuned_network_elsewhere(flags, shards, tmp_path):
    """The released folder serves as --network of another recipe, with its own pixels."""
    out = tmp_path / "run"
    tune.main([*flags, "--save-as", "timm", "--mean", ".1", ".2", ".3", "--std", ".4", ".5", ".6", "--out", str(out)])
    assert load_network(out / "released").mean == (0.1, 0.2, 0.3)
    baselines.main([
        "--train", str(shards / "train"), "--test", str(shards / "test"), "--known", "bag", "--train-limit", "30",
        "--test-limit", "60", "--network", str(out / "released"), "--image-size", "32", "--resize", "32",
        "--detectors", "nearest neighbours", "--out", str(tmp_path / "judged"),
    ])  # fmt: skip
    assert (tmp_path / "judged" / "report.html").is_file()


def test_collapse_is_stopped(flags, tmp_path, capsys):
    """A tuning that spoils the features stops, says why, and leaves the best state, from before it began."""
    out = tmp_path / "run"
    tune.main([*flags, "--tune-lr", "10", "--clip", "1", "--guard-every", "1", "--out", str(out)])
    said, found = capsys.readouterr().out, results(out)
    assert found["stopped"] and f"stopped, because {found['stopped']}" in said
    assert len(losses(out)) < 8 and "stopped it" in events(out, "ended")[0]["text"]
    assert found["kept_step"] == max(looks(out), key=lambda row: (row["knn"]["value"], row["step"]))["step"]
    kept = load_network(out / "teacher.safetensors").backbone.state_dict()
    best = load_network(out / f"best-{found['kept_step']:06}.safetensors").backbone.state_dict()
    assert all(torch.equal(kept[key], best[key]) for key in kept)
    assert len(list(out.glob("best-*"))) == 1
    assert "Tuning was stopped" in (out / "report.html").read_text()


@pytest.mark.parametrize(("processes", "further"), [(1, ["--lora-rank", "4"]), (2, [])])
def test_stop_and_resume(flags, tmp_path, processes, further):
    """A run that is stopped goes on to the same bits and the same looks."""
    flags = [*flags, *further]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run("tune.py", *flags, "--out", whole, processes=processes).returncode == 0
    threading.Thread(target=ask_to_stop, args=(stopped, 2), daemon=True).start()
    assert run("tune.py", *flags, "--out", stopped, processes=processes).returncode != 0
    done = run("tune.py", *flags, "--out", stopped, processes=processes)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    assert (stopped / "teacher.safetensors").read_bytes() == (whole / "teacher.safetensors").read_bytes()
    assert looks(stopped) == looks(whole) and losses(stopped) == losses(whole)


@pytest.mark.parametrize("config", ["", "zero2"])
def test_two_processes(flags, tmp_path, config):
    """Two processes, under ZeRO too, have the losses and the looks of one."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*flags, "--lora-rank", "4", "--tune-lr", "1e-3"]
    assert run("tune.py", *flags, "--out", one).returncode == 0
    done = run("tune.py", *flags, "--out", two, processes=2, config=config)
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    for first, second in zip(looks(one), looks(two), strict=True):
        assert first["images"] == second["images"]
        assert second["rank"] == pytest.approx(first["rank"], rel=1e-3)


def test_flat_folder(teacher, tmp_path, shards, capsys):
    """Pictures without classes are enough: there are no labelled figures, and prototypes for 32 kinds of objects."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, payload in enumerate(ShardSet(str(shards / "test")).read(range(40))):
        (pictures / f"{number}.png").write_bytes(payload)
    assert shards_command(["build", "folder", "--root", str(pictures), "--out", str(tmp_path / "flat")]) == 0
    tune.main(["--train", str(tmp_path / "flat"), "--network", str(teacher), "--image-size", "32", "--crop-size", "16",
               "--tune-batch", "8", "--tune-epochs", "1", "--out", str(tmp_path / "run")])  # fmt: skip
    assert "64 prototypes" in capsys.readouterr().out
    assert "knn" not in results(tmp_path / "run")["before"] and results(tmp_path / "run")["before"]["images"] == 10


@pytest.mark.parametrize("processes", [1, 2])
def test_broken_held_out_picture(flags, shards, tmp_path, processes):
    """A broken picture among those that are looked at is left out of every look, counted once, and not shown."""
    test = ShardSet(str(shards / "test"))
    config = SimpleNamespace(train=str(shards / "test"), train_limit=48, validation_share=0.05, guard_images=40, seed=0)
    sample = int(read_unlabelled(config).held_out_N[0])
    with_broken_picture(shards / "test", tmp_path / "broken", sample)
    done = run("tune.py", *flags, "--train", tmp_path / "broken", "--guard-every", 1, "--out", tmp_path / "run",
               processes=processes)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["images"] for row in looks(tmp_path / "run")] == [39] * 9
    assert test.key(sample) not in (tmp_path / "run" / "report.html").read_text()


MISTAKES = {
    "another kind": (["--network", "swin_tiny_patch4_window7_224", "--no-pretrained"], "merges patches from stage"),
    "a rank above the width": (["--lora-rank", "500"], "--lora-rank is 500, and the tuned layers are 192 wide"),
    "blocks beyond the depth": (["--tuned-blocks", "3"], "tuned-blocks is 3, and the teacher has 2 blocks"),
    "a size that patches do not divide": (["--crop-size", "15"], "patch size 8 does not divide"),
    "no such model there": (["--save-as", "hf", "--network", "beit_base_patch16_224", "--no-pretrained",
                             "--crop-size", "32"], "transformers has no network like beit"),
    "two sizes": (["--network", "beit_base_patch16_224", "--no-pretrained"], "belong to one size of pictures"),
    "a backend without effect": (["--network", "eva02_tiny_patch14_224", "--no-pretrained", "--image-size", "28",
                                  "--crop-size", "28", "--attention", "sdpa"], "is about packed blocks"),
    "half a normalisation": (["--mean", "0.5", "0.5", "0.5"], "--mean has 3 and --std 0 numbers"),
    "two numbers of prototypes": (["--objects", "3", "--prototypes", "6"], "give only one"),
    "one prototype": (["--prototypes", "1"], "use 2 or more"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(flags, tmp_path, capsys, mistake):
    """A mistake gives a one-sentence error and leaves no files."""
    further, says = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        tune.main([*flags, "--out", str(tmp_path / "run"), *further])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_too_few_pictures(teacher, tmp_path, shards, capsys):
    """A set of one picture leaves nothing to look at."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(ShardSet(str(shards / "test")).read([0])[0])
    assert shards_command(["build", "folder", "--root", str(tmp_path / "one"), "--out", str(tmp_path / "set")]) == 0
    with pytest.raises(SystemExit):
        tune.main(["--train", str(tmp_path / "set"), "--network", str(teacher), "--out", str(tmp_path / "run")])
    assert "has 1 images, and 8 must be held out" in capsys.readouterr().err
