"""Normal pictures alone: every recipe that needs no classes trains on them, and says what can be said."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import bigtrain
from shards.shards_cli import main as shards_command
from tests.launching import run

SIZE = ["--image-size", "32", "--score-batch", "16"]
NETWORK = ["--network", "test_resnet", "--no-pretrained", "--resize", "32", *SIZE]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """`normal` and `new`, without classes, where ten of `new` have a red square; `both`, in class folders."""
    folder, rng = tmp_path_factory.mktemp("normal"), np.random.default_rng(0)
    for name, count in (("normal", 40), ("new", 30), ("both/normal", 40), ("both/unknown", 20)):
        (folder / "in" / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(128, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            if name == "new" and number < 10:
                pixels[8:24, 8:24] = (255, 0, 0)
            Image.fromarray(pixels).save(folder / "in" / name / f"{name[:3]}{number}.png")
    for name in ("normal", "new", "both"):
        assert (
            shards_command(["build", "folder", "--root", str(folder / "in" / name), "--out", str(folder / name)]) == 0
        )
    return folder


def ended(recipe, *flags, out, processes=1):
    done = run(recipe, *flags, "--validation-share", 0.25, "--out", out, processes=processes)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "results.json").read_text())


def test_defend(sets, teacher, tmp_path):
    """Without --test it trains, calibrates and explains held-out pictures; the saved detector scores as the run did."""
    flags = ["--train", sets / "normal", "--teacher", teacher, "--crop-size", 16, *SIZE, "--tune-epochs", 1]
    said, results = ended("defend.py", *flags, "--distil-epochs", 1, "--predict", "all", out=tmp_path / "run")
    assert results["normal_only"] and "auroc" not in results and results["explained"]["low"] <= 1
    assert "the threshold rests on 10 held-out pictures" in said and "will be flagged" in said
    scores = pq.read_table(tmp_path / "run" / "scores.parquet").to_pylist()
    assert {row["split"] for row in scores} == {"held_out", "train"} and len(scores) == 40
    detector = bigtrain.load_detector(tmp_path / "run" / "detector")
    row = next(row for row in scores if row["split"] == "held_out")
    assert detector.score([sets / "in" / "normal" / f"{row['key']}.png"])[0] == row["score"]
    assert detector.scoring.threshold == results["threshold"]["value"]
    assert "The most unusual training pictures" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_unlabelled(sets, tmp_path, processes):
    """A test set without classes is scored and shown, and is in no figure; the same with two processes."""
    flags = ["--train", sets / "normal", "--test", sets / "new", *NETWORK]
    _, results = ended("signatures.py", *flags, out=tmp_path / "run", processes=processes)
    assert results["threshold"]["unlabelled"] == 30 and "auroc" not in results
    rows = [
        row for row in pq.read_table(tmp_path / "run" / "scores.parquet").to_pylist() if row["split"] == "unlabelled"
    ]
    assert len(rows) == 30 and {row["novel"] for row in rows} == {None}
    assert "The most novel unlabelled pictures" in (tmp_path / "run" / "report.html").read_text()


def test_unlabelled_class(sets, tmp_path):
    """--unlabelled takes a class out of training and figures; a name that is none is refused."""
    flags = ["--train", sets / "both", *NETWORK]
    _, results = ended("baselines.py", *flags, "--unlabelled", "unknown", out=tmp_path / "run")
    assert results["known"] == ["normal"] and results["novel"] == []
    for figures in results["detectors"].values():
        assert figures["threshold"]["unlabelled"] == 20
    page = (tmp_path / "run" / "report.html").read_text()
    assert "will flag from" in page and "unlabelled flagged" in page and "By nearest neighbours pre." in page
    saved = sorted(path.name for path in (tmp_path / "run" / "detectors").iterdir())
    assert saved == sorted(name.replace(" ", "_") for name in results["detectors"])
    refused = run("baselines.py", *flags, "--unlabelled", "nothing", "--out", tmp_path / "none")
    assert refused.returncode == 2 and "--unlabelled names nothing" in refused.stderr


def test_train_as_test(sets, tmp_path):
    """The training pictures as test pictures are refused."""
    flags = ["--train", sets / "both", "--test", sets / "both", "--known", "normal", *NETWORK]
    done = run("baselines.py", *flags, "--out", tmp_path / "run")
    assert done.returncode == 2 and "are training pictures" in done.stderr
    assert not (tmp_path / "run").exists()
