"""Mosaics of a shard set."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Sample
from bigtrain.data.set_files import read_index, read_manifest
from shards.adapters import mosaic
from shards.build import build
from shards.build_settings import Settings

CLASSES = ["ant", "bee", "cow", "elk"]


@pytest.fixture
def tiles(tmp_path: Path, build_folder: Callable[..., object]) -> str:
    """Forty pictures of 6 x 4, each of one grey that no other has."""
    for place in range(40):
        path = tmp_path / "pictures" / CLASSES[place % 4] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (place, place, place)).save(path)
    build_folder(tmp_path / "pictures", tmp_path / "set")
    return str(tmp_path / "set")


def mosaics(root: str, **options: Any) -> list[Sample]:
    chosen = {
        "known": "bee",
        "mode": "test",
        "count": 200,
        "seed": 0,
        "grid": 2,
        "known_tiles": 1,
        "tile": None,
        **options,
    }
    return [painted(sample) for sample in mosaic.samples(root, chosen["mode"], **chosen)]


def painted(sample: Sample) -> Sample:
    """With its picture, as a worker makes it."""
    assert callable(sample.image)
    return replace(sample, image=sample.image())


def greys(sample: Sample, grid: int = 2) -> list[int]:
    """The grey of each tile, in reading order."""
    assert isinstance(sample.image, bytes)
    pixels = np.asarray(Image.open(io.BytesIO(sample.image)))[..., 0]
    assert pixels.shape == (4 * grid, 6 * grid)
    return [int(pixels[4 * (n // grid) + 1, 6 * (n % grid) + 1]) for n in range(grid * grid)]


@pytest.mark.parametrize("grid", [2, 3])
def test_tiles(tiles, grid):
    """Every tile has its box and class and shows its picture's pixels, and no picture comes twice."""
    for sample in mosaics(tiles, count=20, grid=grid):
        shown = greys(sample, grid)
        assert len(set(shown)) == grid * grid  # no picture twice
        for number, thing in enumerate(sample.objects):
            box = thing.box
            assert (box.top, box.left) == (4 * (number // grid), 6 * (number % grid))
            assert (box.bottom - box.top, box.right - box.left) == (4, 6)
            assert thing.class_name == CLASSES[shown[number] % 4]
        assert sample.source.split() == [f"{CLASSES[grey % 4]}/{grey}" for grey in shown]


def test_known_class(tiles):
    """All training mosaics show the known class; every second one of test does not."""
    assert all("bee" in sample.classes for sample in mosaics(tiles, mode="train"))
    known = ["bee" in sample.classes for sample in mosaics(tiles)]
    assert known == [True, False] * 100


def test_known_distribution(tiles):
    """Training and known test mosaics have the same distribution of known tiles, at uniform positions."""
    train = mosaics(tiles, mode="train", count=2000)
    test = [sample for sample in mosaics(tiles, count=4000) if "bee" in sample.classes]
    shares = []
    for found in (train, test):
        bees = [[thing.class_name for thing in sample.objects].count("bee") for sample in found]
        shares.append([bees.count(n) / len(bees) for n in (1, 2, 3, 4)])
        places = Counter(n for sample in found for n, thing in enumerate(sample.objects) if thing.class_name == "bee")
        assert max(places.values()) / min(places.values()) < 1.15
    # one tile is always a bee, the other three with probability 1/4 each (slightly less: no picture repeats)
    assert shares[0] == pytest.approx([0.42, 0.42, 0.14, 0.02], abs=0.05)
    assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_known_tiles(tiles):
    """More `known_tiles` make the known class prevalent, and more than the grid has are refused."""
    found = mosaics(tiles, mode="train", count=1000, known_tiles=4)
    bees = [[thing.class_name for thing in sample.objects].count("bee") for sample in found]
    assert min(bees) == 1 and 0.25 < bees.count(4) / 1000 < 0.4  # a quarter on purpose, and some by chance
    with pytest.raises(ValueError, match="must be 1 to 4"):
        mosaic.about(tiles, "train", known="bee", mode="train", count=4, seed=0, grid=2, known_tiles=5, tile=None)


def test_seed(tiles):
    """A seed gives the same mosaics, whatever the count; another seed or mode gives others."""
    first = mosaics(tiles, count=10)
    assert first == mosaics(tiles, count=10)
    assert first[:6] == mosaics(tiles, count=6)
    assert [s.source for s in first] != [s.source for s in mosaics(tiles, count=10, seed=1)]
    assert [s.source for s in first] != [s.source for s in mosaics(tiles, count=10, mode="train")]


def test_build(tiles, tmp_path, contents):
    """A set of mosaics is built like any other, the same with one worker or two."""
    options = {"known": "cow", "mode": "test", "count": 8, "seed": 3, "grid": 2, "known_tiles": 1, "tile": None}
    settings = Settings("mosaic", tiles, "test", samples_per_shard=3, options=options)
    manifest = build(settings, tmp_path / "one")
    build(settings, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (manifest.dataset, manifest.split, manifest.samples) == ("pictures-mosaic", "test", 8)
    assert manifest.classes == tuple(CLASSES)
    assert set(read_index(str(tmp_path / "one"))["width"].to_pylist()) == {12}
    given = {name: value for name, value in options.items() if value is not None}
    assert json.loads((tmp_path / "one" / "build.json").read_text())["options"] == given


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"known": "beee"}, "did you mean 'bee'"),
        ({"count": 7}, "give 6 or 8"),
        ({"grid": 6}, "a mosaic needs 36"),
    ],
)
def test_impossible_mosaic(tiles, options, sentence):
    """An impossible mosaic is refused with what would be possible."""
    chosen = {
        "known": "bee",
        "mode": "test",
        "count": 4,
        "seed": 0,
        "grid": 2,
        "known_tiles": 1,
        "tile": None,
        **options,
    }
    with pytest.raises(ValueError, match=sentence):
        mosaic.about(tiles, "test", **chosen)


def test_view(tiles, tmp_path):
    """A view gives only its own pictures, from the tars of the set."""
    view = tmp_path / "views" / "first"
    view.mkdir(parents=True)
    index, manifest = read_index(tiles), read_manifest(tiles)
    few = index.take([row for row, key in enumerate(index["key"].to_pylist()) if int(key.split("/")[1]) < 16])
    rows = Counter(few["shard"].to_pylist())
    shards = tuple(replace(shard, samples=rows[number]) for number, shard in enumerate(manifest.shards))
    (view / MANIFEST_FILE).write_text(replace(manifest, shards=shards, shards_at="../../set").to_json())
    pq.write_table(few, view / INDEX_FILE)
    shown = {grey for sample in mosaics(str(view)) for grey in greys(sample)}
    assert shown == set(range(16))


def test_url(tiles):
    """A set behind a URL gives the same mosaics, and a tar that is missing there is named."""
    memory = fsspec.filesystem("memory")
    memory.put(tiles, "/mosaic-tiles", recursive=True)
    try:
        assert mosaics("memory://mosaic-tiles", count=10) == mosaics(tiles, count=10)
        memory.rm("/mosaic-tiles/000000.tar")
        with pytest.raises(OSError, match=r"cannot be read from memory://mosaic-tiles/000000.tar .*check the set"):
            mosaics("memory://mosaic-tiles")
    finally:
        memory.rm("/mosaic-tiles", recursive=True)


def test_tile_size(animals, paint, build_folder, tmp_path):
    """Pictures of different sizes need the side of a tile (--tile)."""
    paint(0, (50, 30), path=animals / "cat" / "large.jpg")
    build_folder(animals, tmp_path / "set")
    with pytest.raises(ValueError, match="2 sizes: give the side of a tile with --tile"):
        mosaics(str(tmp_path / "set"), known="cat", count=2)
    for sample in mosaics(str(tmp_path / "set"), known="cat", count=6, tile=10):
        assert isinstance(sample.image, bytes)
        assert Image.open(io.BytesIO(sample.image)).size == (20, 20)
