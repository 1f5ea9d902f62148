"""A set with masks: the run judges its maps' pixels, beside those of a student that ignores the picture."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

import bigtrain
from bigtrain.data.shard_set import ShardSet
from bigtrain.evaluation.pixel_figures import PixelCounts, at_size, mask_of, masks_of
from shards.shards_cli import main as shards_command
from tests.launching import run


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Grey noise, some of it with a bright spot and its mask, of several sizes, in MVTec AD's layout."""
    folder, rng = tmp_path_factory.mktemp("masked"), np.random.default_rng(0)
    for part, count in (("train/good", 24), ("test/good", 10), ("test/spot", 14)):
        (folder / "tile" / part).mkdir(parents=True)
        for number in range(count):
            width, height = 40 + 3 * number, 48
            image = Image.fromarray(rng.normal(110, 15, (height, width, 3)).clip(0, 255).astype(np.uint8))
            if "spot" in part:
                place = (number % 20, 10, number % 20 + 14, 26)
                ImageDraw.Draw(image).ellipse(place, fill=(255, 240, 40))
                mask = Image.new("L", image.size)
                ImageDraw.Draw(mask).ellipse(place, fill=255)
                (folder / "tile/ground_truth/spot").mkdir(parents=True, exist_ok=True)
                mask.save(folder / f"tile/ground_truth/spot/{number:03d}_mask.png")
            image.save(folder / "tile" / part / f"{number:03d}.png")
    for split in ("train", "test"):
        line = [
            "build",
            "mvtec",
            "--root",
            folder / "tile",
            "--split",
            split,
            "--out",
            folder / split,
            "--workers",
            "1",
        ]
        assert shards_command(list(map(str, line))) == 0
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_pixel_figures(sets, teacher, tmp_path, processes):
    """They are those of the saved detector's maps, one by one; the report shows them, and the outlines of masks."""
    flags = ["--train", sets / "train", "--test", sets / "test", "--known", "good", "--teacher", teacher, "--no-tune"]
    flags += ["--image-size", 32, "--crop-size", 16, "--distil-steps", 6, "--distil-batch", 6, "--score-batch", 8]
    done = run("defend.py", *flags, "--out", tmp_path / "run", processes=processes)
    assert done.returncode == 0, done.stderr
    pixels = json.loads((tmp_path / "run" / "results.json").read_text())["pixels"]
    test, counts = ShardSet(str(sets / "test")), PixelCounts()
    detector, masks = bigtrain.load_detector(tmp_path / "run", device="cpu"), masks_of(test)
    for sample in range(len(test)):
        (payload,) = test.read([sample])
        width, height = Image.open(io.BytesIO(payload)).size
        encoded = masks.get(test.key(sample))
        mask_HW = mask_of(encoded) if encoded else np.zeros((height, width), bool)
        counts.add(at_size(detector.score_map([payload])[0], height, width), mask_HW, sample)
    assert pixels["images"] == 24 and pixels["regions"] == 14 and len(masks) == 14
    for name, its in counts.estimates().items():
        found = pixels[name]
        assert (found["value"], found["low"], found["high"]) == pytest.approx(tuple(its), abs=1e-3), name
    assert set(pixels["floor"]) == {"auroc", "ap", "f1_max", "aupro"}
    assert pixels["prevalence"] == pytest.approx(counts.prevalence)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Pixels</h2>" in page and "ignoring the picture: " in page
