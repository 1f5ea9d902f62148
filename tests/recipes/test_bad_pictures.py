"""A picture that cannot be decoded, in training: named, left out, and counted once in each epoch."""

import numpy as np
import pytest
from PIL import Image

from bigtrain.data.set_files import read_index
from shards.build import build
from shards.build_settings import Settings
from tests.launching import run

SMALL = ["--model", "vit_tiny_patch16_224", "--image-size", "16", "--patch-size", "8", "--depth", "1", "--batch", "8"]


@pytest.mark.parametrize(("bad", "code"), [(1, 0), (2, 2)])
def test_too_many_bad(tmp_path, bad, code):
    """One bad picture of forty is skipped in every epoch without harm; two end the run."""
    rng = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "in" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    for name in ("train", "val"):
        build(Settings("folder", str(tmp_path / "in"), "train"), tmp_path / name)
    tar = tmp_path / "train" / "000000.tar"
    data = bytearray(tar.read_bytes())
    for row in read_index(str(tmp_path / "train")).to_pylist()[:bad]:
        data[row["image_offset"] : row["image_offset"] + row["image_size"]] = bytes(row["image_size"])
    tar.write_bytes(data)
    sets = ["--train", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--out", str(tmp_path / "run")]
    done = run("pretrain.py", *sets, *SMALL, "--epochs", "3", "--warmup-epochs", "0")
    assert done.returncode == code, done.stderr
    assert ("2 of 40 pictures cannot be decoded" in done.stderr) == (bad == 2)
    assert "skipped a/00" in done.stderr
