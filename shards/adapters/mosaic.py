"""Mosaics of a shard set: n x n of its pictures in one, labelled with all their classes, and a box for each tile.

A known mosaic has 1 to --known-tiles pictures of the known class (drawn uniformly) at random places; for every other
tile a class is drawn uniformly from all classes of the set, then a picture of it. A novel mosaic draws all tiles so,
from pictures without the known class.
--mode train: all known; --mode test: known and novel in turn, half and half. No picture is twice in one mosaic.
"""

from __future__ import annotations

import difflib
import functools
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from bigtrain.data.schema import Box, Object, Sample, filesystem, read_index, read_manifest, shards_url
from shards.adapters.about import About
from shards.pictures import decode

LAYOUT = "a finished shard set, whose pictures become the tiles"
OPTIONS: dict[str, dict[str, Any]] = {
    "--known": {"required": True, "metavar": "CLASS", "help": "the known class"},
    "--mode": {
        "required": True,
        "choices": ["train", "test"],
        "help": "train: all known; test: half known, half novel",
    },
    "--count": {"required": True, "type": int, "metavar": "N", "help": "how many mosaics"},
    "--seed": {"type": int, "default": 0, "metavar": "S", "help": "another seed, other mosaics (default: 0)"},
    "--grid": {"type": int, "default": 2, "metavar": "n", "help": "n x n tiles (default: 2)"},
    "--known-tiles": {
        "type": int,
        "default": 1,
        "metavar": "K",
        "help": "at most so many tiles of a known mosaic are of the known class on purpose (default: 1)",
    },
    "--tile": {
        "type": int,
        "metavar": "PIXELS",
        "help": "side of a tile, cut from the middle and resized; needed where the pictures differ in size",
    },
}


@dataclass(frozen=True)
class Pool:
    """The set's pictures by class, each a row of its index and the tar that it lies in."""

    at: str  # where the tars lie: of a view that is not the set's own place
    rows: list[dict[str, Any]]
    by_class: dict[str, list[int]]
    novel_by_class: dict[str, list[int]]  # pictures that do not show the known class


def about(root: str | Path, split: str, **options: Any) -> About:
    known, mode, count, grid = (options[name] for name in ("known", "mode", "count", "grid"))
    manifest = read_manifest(str(root))
    if known not in manifest.classes:
        near = difflib.get_close_matches(known, manifest.classes, n=3) or manifest.classes[:10]
        raise ValueError(
            f"--known {known} is no class of {root}; it has {', '.join(near)} ...: give one of its classes."
        )
    if count < 1 or grid < 2 or (options["tile"] is not None and options["tile"] < 1):
        raise ValueError(f"--count {count} must be at least 1, --grid {grid} at least 2, --tile at least 1.")
    if not 1 <= options["known_tiles"] <= grid * grid:
        raise ValueError(f"--known-tiles is {options['known_tiles']}; a mosaic of {grid * grid} tiles has 1 to that.")
    if mode == "test" and count % 2:
        raise ValueError(f"--count {count} does not halve into known and novel: give {count - 1} or {count + 1}.")
    pool = pool_of(str(root), known)
    novel = {row for rows in pool.novel_by_class.values() for row in rows}
    shown = {row for rows in pool.by_class.values() for row in rows}
    for name, there, needed in (
        (f"pictures of {known}", len(pool.by_class.get(known, [])), options["known_tiles"]),
        ("labelled pictures", len(shown), grid * grid),
        (f"pictures without {known}", len(novel), grid * grid if mode == "test" else 0),
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
        tiles = [pool.rows[row] for row in drawn(rng, pool, known if is_known else None, known_tiles, grid * grid)]
        yield mosaic(f"{options['mode']}-{number:06d}", pool.at, tiles, grid, size)


def drawn(rng: random.Random, pool: Pool, known: str | None, known_tiles: int, tiles: int) -> list[int]:
    """The rows of one mosaic, in reading order; known is None for a novel one."""
    by_class = pool.novel_by_class if known is None else pool.by_class
    names = sorted(by_class)
    rows: list[int] = [] if known is None else rng.sample(by_class[known], rng.randint(1, known_tiles))
    while len(rows) < tiles:
        row = rng.choice(by_class[rng.choice(names)])
        if row not in rows:
            rows.append(row)
    rng.shuffle(rows)
    return rows


def mosaic(key: str, shards_at: str, tiles: list[dict[str, Any]], grid: int, size: tuple[int, int]) -> Sample:
    width, height = size
    canvas = Image.new("RGB", (grid * width, grid * height))
    objects = []
    for place, row in enumerate(tiles):
        top, left = place // grid * height, place % grid * width
        canvas.paste(tile(shards_at, row, size), (left, top))
        box = Box(top=top, left=left, bottom=top + height, right=left + width)
        objects += [Object(name, box) for name in row["classes"]]
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return Sample(key, file.getvalue(), "png", objects, source=" ".join(row["key"] for row in tiles))


def tile(shards_at: str, row: dict[str, Any], size: tuple[int, int]) -> Image.Image:
    """One picture, read by its offset in the tar; the largest middle part of the tile's shape, resized if need be."""
    fs, path = filesystem(shards_at)
    start, end = row["image_offset"], row["image_offset"] + row["image_size"]
    try:
        encoded = fs.cat_file(f"{path}/{row['file']}", start=start, end=end)
        image = ImageOps.exif_transpose(decode(encoded)).convert("RGB")
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
    manifest = read_manifest(root)
    files = [shard.file for shard in manifest.shards]
    rows = [{**row, "file": files[row["shard"]]} for row in read_index(root).to_pylist()]
    by_class: dict[str, list[int]] = {}
    novel: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        for name in row["classes"]:
            by_class.setdefault(name, []).append(place)
            if known not in row["classes"]:
                novel.setdefault(name, []).append(place)
    return Pool(shards_url(root, manifest), rows, by_class, novel)


def tile_size(pool: Pool, tile: int | None) -> tuple[int, int]:
    """Width and height of a tile: --tile squared, or the one size that all pictures have."""
    if tile is not None:
        return tile, tile
    sizes = {(row["width"], row["height"]) for row in pool.rows}
    if len(sizes) > 1:
        raise ValueError(f"the pictures have {len(sizes)} sizes: give the side of a tile with --tile, 224 say.")
    return sizes.pop()
