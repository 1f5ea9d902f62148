"""Mosaics of a shard set: n x n of its pictures in one, labelled with all their classes, and a box for each tile.

A known mosaic has 1 to --known-tiles pictures of the known class (drawn uniformly) at random places; for every other
tile a class is drawn uniformly from all classes of the set, then a picture of it. A novel mosaic draws all tiles so,
from pictures without the known class.
--mode train: all known; --mode test: known and novel in turn, half and half. No picture is twice in one mosaic.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigtrain.data.schema import Box, Object, Sample
from bigtrain.images import decode_rgb
from shards.adapters.about import About
from shards.treatment import png

if TYPE_CHECKING:
    import pyarrow as pa

LAYOUT = "a finished shard set, whose pictures become the tiles"
OPTIONS: dict[str, dict[str, Any]] = {
    "--known": {"required": True, "metavar": "CLASS", "help": "the known class"},
    "--mode": {
        "required": True,
        "choices": ["train", "test"],
        "help": "train: all known; test: half known, half novel",
    },
    "--count": {"required": True, "type": int, "metavar": "N", "help": "how many mosaics"},
    "--seed": {"type": int, "default": 0, "metavar": "S", "help": "seed of the mosaics (default: 0)"},
    "--grid": {"type": int, "default": 2, "metavar": "n", "help": "n x n tiles (default: 2)"},
    "--known-tiles": {
        "type": int,
        "default": 1,
        "metavar": "K",
        "help": "a known mosaic has 1 to K tiles chosen from the known class (default: 1)",
    },
    "--tile": {
        "type": int,
        "metavar": "PIXELS",
        "help": "side of a tile, cut from the middle and resized; needed where the pictures differ in size",
    },
}


@dataclass(frozen=True)
class Pool:
    """The set's pictures by class, as numbers of rows of its index."""

    at: str  # where the tars lie; for a view, not its own folder
    files: list[str]
    index: pa.Table
    by_class: dict[str, NDArray[np.int64]]
    novel_by_class: dict[str, NDArray[np.int64]]  # pictures that do not show the known class

    def rows(self, numbers: list[int]) -> list[dict[str, Any]]:
        return [{**row, "file": self.files[row["shard"]]} for row in self.index.take(numbers).to_pylist()]


def about(root: str | Path, split: str, **options: Any) -> About:
    from shards.existing_set import check_classes, manifest_of

    known, mode, count, grid = (options[name] for name in ("known", "mode", "count", "grid"))
    manifest = manifest_of(str(root))
    check_classes(str(root), manifest, [known])
    if count < 1 or grid < 2 or (options["tile"] is not None and options["tile"] < 1):
        raise ValueError(f"--count {count} must be at least 1, --grid {grid} at least 2, --tile at least 1.")
    if not 1 <= options["known_tiles"] <= grid * grid:
        raise ValueError(f"--known-tiles is {options['known_tiles']}; it must be 1 to {grid * grid}.")
    if mode == "test" and count % 2:
        raise ValueError(f"--count {count} does not halve into known and novel: give {count - 1} or {count + 1}.")
    pool = pool_of(str(root), known)
    for name, there, needed in (
        (f"pictures of {known}", len(pool.by_class.get(known, [])), options["known_tiles"]),
        ("labelled pictures", distinct(pool.by_class), grid * grid),
        (f"pictures without {known}", distinct(pool.novel_by_class), grid * grid if mode == "test" else 0),
    ):
        if there < needed:
            raise ValueError(f"{root} has {there} {name}, and a mosaic needs {needed}: use a larger set.")
    tile_size(pool, options.get("tile"))
    return About(f"{manifest.dataset}-mosaic", list(manifest.classes), manifest.licence, count)


def samples(root: str | Path, split: str, **options: Any) -> Iterator[Sample]:
    """Yield `count` mosaics; each depends on the seed, the mode and its number alone."""
    pool = pool_of(str(root), options["known"])
    grid, size = options["grid"], tile_size(pool, options.get("tile"))
    known, known_tiles = options["known"], options["known_tiles"]
    for number in range(options["count"]):
        rng = random.Random(f"{options['seed']} {options['mode']} {number}")
        is_known = options["mode"] == "train" or number % 2 == 0
        tiles = pool.rows(drawn(rng, pool, known if is_known else None, known_tiles, grid * grid))
        yield mosaic(f"{options['mode']}-{number:06d}", pool.at, tiles, grid, size)


def drawn(rng: random.Random, pool: Pool, known: str | None, known_tiles: int, tiles: int) -> list[int]:
    """The rows of one mosaic, in reading order; known is None for a novel one."""
    by_class = pool.novel_by_class if known is None else pool.by_class
    names = sorted(by_class)
    rows: list[int] = []
    if known is not None:
        count = rng.randint(1, known_tiles)
        rows = [int(by_class[known][place]) for place in rng.sample(range(len(by_class[known])), count)]
    while len(rows) < tiles:
        row = int(rng.choice(by_class[rng.choice(names)]))
        if row not in rows:
            rows.append(row)
    rng.shuffle(rows)
    return rows


def mosaic(key: str, shards_at: str, tiles: list[dict[str, Any]], grid: int, size: tuple[int, int]) -> Sample:
    width, height = size
    objects = []
    for place, row in enumerate(tiles):
        top, left = place // grid * height, place % grid * width
        box = Box(top=top, left=left, bottom=top + height, right=left + width)
        objects += [Object(name, box) for name in row["classes"]]
    painting = functools.partial(painted, shards_at, tiles, grid, size)  # done by the worker that packs it
    return Sample(key, painting, "png", objects, source=" ".join(row["key"] for row in tiles))


def painted(shards_at: str, tiles: list[dict[str, Any]], grid: int, size: tuple[int, int]) -> bytes:
    """The mosaic as a PNG."""
    width, height = size
    canvas = Image.new("RGB", (grid * width, grid * height))
    for place, row in enumerate(tiles):
        canvas.paste(tile(shards_at, row, size), (place % grid * width, place // grid * height))
    return png(canvas)


def tile(shards_at: str, row: dict[str, Any], size: tuple[int, int]) -> Image.Image:
    """One picture, read by its offset in the tar; the largest middle part of the tile's shape, resized if need be."""
    from bigtrain.data.set_files import filesystem

    fs, path = filesystem(shards_at)
    start, end = row["image_offset"], row["image_offset"] + row["image_size"]
    try:
        encoded = fs.cat_file(f"{path}/{row['file']}", start=start, end=end)
        image = Image.fromarray(decode_rgb(encoded))
    except Exception as error:  # each file system has errors of its own
        raise OSError(
            f"{row['key']} cannot be read from {shards_at}/{row['file']} ({error}): check the set."
        ) from error
    if image.size == size:
        return image
    scale = min(image.width / size[0], image.height / size[1])
    width, height = scale * size[0], scale * size[1]
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


@functools.lru_cache(maxsize=1)
def pool_of(root: str, known: str) -> Pool:
    from bigtrain.data.set_files import read_index, shards_url
    from shards.existing_set import manifest_of
    from shards.split import objects

    manifest = manifest_of(root)
    index = read_index(root).combine_chunks()
    row_of_label, number_of_label, names = objects(index)
    shows_known = np.zeros(len(index), bool)
    shows_known[row_of_label[number_of_label == names.get(known, -1)]] = True
    order = np.argsort(number_of_label, kind="stable")
    edges = np.searchsorted(number_of_label[order], np.arange(1, len(names)))
    by_class = dict(zip(names, np.split(row_of_label[order].astype(np.int64), edges), strict=True)) if names else {}
    novel = {name: rows[~shows_known[rows]] for name, rows in by_class.items()}
    novel = {name: rows for name, rows in novel.items() if len(rows)}
    return Pool(shards_url(root, manifest), [shard.file for shard in manifest.shards], index, by_class, novel)


def distinct(by_class: dict[str, NDArray[np.int64]]) -> int:
    return len(np.unique(np.concatenate(list(by_class.values())))) if by_class else 0


def tile_size(pool: Pool, tile: int | None) -> tuple[int, int]:
    """Width and height of a tile: --tile squared, or the one size that all pictures have."""
    if tile is not None:
        return tile, tile
    sizes = pool.index.select(["width", "height"]).group_by(["width", "height"]).aggregate([]).to_pylist()
    if len(sizes) > 1:
        raise ValueError(f"the pictures have {len(sizes)} sizes: give the side of a tile with --tile, 224 say.")
    return sizes[0]["width"], sizes[0]["height"]
