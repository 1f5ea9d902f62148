"""`bigtrain calibrate`: a new threshold without training, and whether the new pictures look like the old ones."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp

import bigtrain


@pytest.fixture
def normal(tmp_path):
    """120 pictures of noise, like those of `saved`."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "normal"
    folder.mkdir()
    for number in range(120):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def test_new_threshold(saved, normal, tmp_path, command):
    """The threshold is the percentile of the new scores, which are kept; a copy leaves the detector as it was."""
    before = json.loads((saved / "detector.json").read_text())
    flags = ["--detector", saved, "--normal", normal, "--percentile", 90]
    code, said, _ = command("calibrate", *flags, "--out", tmp_path / "copy")
    assert code == 0 and json.loads((saved / "detector.json").read_text()) == before
    scores = bigtrain.load_detector(saved, device="cpu").score(sorted(normal.iterdir()))
    copy = bigtrain.load_detector(tmp_path / "copy", device="cpu")
    assert copy.scoring.threshold == np.quantile(scores, 0.9, method="higher")
    assert copy.calibration.score_N.tolist() == sorted(scores) and copy.calibration.pictures == str(normal)
    kept = json.loads((tmp_path / "copy" / "detector.json").read_text())["calibration"]["compared"]
    expected = ks_2samp(before["calibration"]["held_out_scores"], scores)
    assert kept["p_value"] == pytest.approx(expected.pvalue) and kept["before"]["count"] == 40
    assert f"from {len(scores)} normal pictures" in said and f"(it was {before['threshold']:.6g})" in said
    assert command("calibrate", *flags)[0] == 0  # in place
    assert bigtrain.load_detector(saved, device="cpu").scoring == copy.scoring


def test_other_pictures_are_told(saved, normal, tmp_path, command):
    """Darker pictures do not look like the held-out ones, and it says so; the same kind does not raise alarm."""
    _, same, _ = command("calibrate", "--detector", saved, "--normal", normal, "--out", tmp_path / "same")
    assert "no difference to the 40 scores before" in same
    dark = tmp_path / "dark"
    dark.mkdir()
    for file in normal.iterdir():
        Image.open(file).point(lambda value: value // 4).save(dark / file.name)
    _, other, _ = command("calibrate", "--detector", saved, "--normal", dark, "--out", tmp_path / "other")
    assert "these pictures do not look like the 40 scores before" in other


def test_card_follows(finished, photos, tmp_path, command):
    """The card of a detector that was calibrated tells its new threshold, and loses the pictures around the old one."""
    normal = photos / "ankle_boot"
    code, _, error = command("calibrate", "--detector", finished, "--normal", normal, "--out", tmp_path / "new")
    assert code == 0, error
    card = (tmp_path / "new" / "README.md").read_text()
    threshold = json.loads((tmp_path / "new" / "detector.json").read_text())["threshold"]
    assert f"Scores above {threshold:.6g} are called novel" in card and "set after training" in card
    assert card.count("## Threshold") == card.count("## Limits") == card.count("## Figures") == 1
    assert "threshold.jpg" not in card and not (tmp_path / "new" / "threshold.jpg").exists()
    assert (finished / "detector" / "threshold.jpg").exists()


def test_few_and_broken_pictures(saved, normal, broken, tmp_path, command):
    """So few pictures that the rate cannot be promised: it says how many are needed. What cannot be read is named."""
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(normal.iterdir())[:9]:
        shutil.copy(file, few)
    (few / "empty.png").write_bytes(broken["empty.png"])
    code, said, _ = command("calibrate", "--detector", saved, "--normal", few)
    assert code == 3 and "of 9 pictures a rate of 5 % cannot be promised: at least 19 are needed" in said
    assert "empty.png: not a picture: the file is empty" in said


def test_mistakes(saved, normal, tmp_path, command):
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.onnx").write_bytes(b"")
    for flags, said in (
        (["--normal", tmp_path / "empty"], "holds no pictures"),
        (["--percentile", 100], "must be from 0.01 to 99.99"),
        (["--out", tmp_path / "empty"], "exists: name a new folder"),
        (["--detector", tmp_path / "m.onnx"], "calibrate the detector that it was made from"),
        (["--detector", tmp_path / "empty"], "holds no detector.json"),
        (["--detector", "hf://user/name", "--out"], "is a copy of the hub's, and is not changed: give --out"),
    ):
        line = {"--detector": saved, "--normal": normal, "--out": tmp_path / "new"} | {flags[0]: flags[1]}
        if flags[2:]:  # without it
            del line[flags[2]]
        code, _, error = command("calibrate", *[part for pair in line.items() for part in pair])
        assert code == 2 and said in error and error.count("\n") == 1, error
        assert not (tmp_path / "new").exists()
