"""Values for every image: each once, and one that cannot be decoded counts once against the budget."""

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from bigtrain.data.set_files import read_index
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.data.views import Resized
from bigtrain.evaluation.collect import collect, mean_over
from shards.build import build
from shards.build_settings import Settings


@pytest.fixture
def spoiled(tmp_path):
    """spoiled(n): a set of 20 pictures, the first n of which were overwritten in the tar."""

    def made(count):
        rng = np.random.default_rng(0)
        (tmp_path / "in" / "a").mkdir(parents=True)
        for number in range(20):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "in" / "a" / f"{number:02d}.png")
        build(Settings("folder", str(tmp_path / "in"), "train"), tmp_path / "out")
        tar = tmp_path / "out" / "000000.tar"
        data = bytearray(tar.read_bytes())
        for row in read_index(str(tmp_path / "out")).to_pylist()[:count]:
            data[row["image_offset"] : row["image_offset"] + row["image_size"]] = bytes(row["image_size"])
        tar.write_bytes(data)
        return ShardSet(str(tmp_path / "out"))

    return made


def means(shard_set):
    stream = Stream(shard_set, shard_set.plan(np.arange(20), 6, shuffle=False), Resized(8))
    return collect(Accelerator(cpu=True), stream, {"mean": lambda image_B3HW: image_B3HW.float().mean(dim=(1, 2, 3))})


def test_undecodable_left_out(spoiled):
    """A picture that cannot be decoded is left out and counts once."""
    sample_N, values = means(spoiled(1))
    assert sample_N.tolist() == list(range(1, 20))
    assert len(values["mean"]) == 19


def test_over_budget(spoiled):
    """More undecodable pictures than the budget allows stop the evaluation."""
    with pytest.raises(ValueError, match="2 of 20 pictures cannot be decoded"):
        means(spoiled(2))


def test_mean_over(spoiled):
    """A mean over pictures counts each once, padding and what cannot be decoded left out."""
    shard_set = spoiled(1)
    _, values = means(shard_set)
    stream = Stream(shard_set, shard_set.plan(np.arange(20), 6, shuffle=False), Resized(8))
    found = mean_over(Accelerator(cpu=True), stream, lambda image_B3HW: image_B3HW.float().flatten(1)[:, :2])
    stream = Stream(shard_set, shard_set.plan(np.arange(20), 6, shuffle=False), Resized(8))
    kept = {"all": lambda image_B3HW: image_B3HW.float().flatten(1)[:, :2]}
    expected = collect(Accelerator(cpu=True), stream, kept)[1]["all"]
    assert len(values["mean"]) == len(expected) == 19 and found.shape == (2,)
    assert found.tolist() == pytest.approx(expected.mean(axis=0))
    assert list(stream.budget.skipped)
