"""What each epoch would make again: resized views, a teacher's tokens; in the run folder, or shared in --cache-dir."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from bigtrain.data.decode import jpeg_decoder
from bigtrain.data.row_cache import RowCache, why_no_room
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Transform, is_fixed
from bigtrain.text import clean

if TYPE_CHECKING:
    from bigtrain.training.run_setup import Setup

FOLDER = "cache"  # in the run folder, until the run is finished


def folder_of(setup: Setup) -> Path:
    return Path(setup.settings.cache_dir) if setup.settings.cache_dir else setup.run / FOLDER


def view_cache(
    setup: Setup, shard_set: ShardSet, view: Transform, images: int, *, is_repeated: bool
) -> RowCache | None:
    """Where the views of a shard set are kept, if they are: those that are read again, in this run or, with
    --cache-dir, by others. Called on all ranks.

    Args:
        images: how many of the set are read.
        is_repeated: this run reads them several times; else a cache is used if it is there already.
    """
    if not (is_fixed(view) and setup.settings.cache_gib):
        return None
    (blank,) = view.blank().values()
    cache = RowCache(
        folder_of(setup), "views", {"data set": data_of(shard_set), "view": [repr(view)], "decoder": decoder()},
        rows=len(shard_set), row_bytes=blank.nbytes,
    )  # fmt: skip
    is_there = any(gather_object([cache.exists()]))  # each rank looks at a disk of its own
    if not (is_repeated or setup.settings.cache_dir or is_there):
        return None
    return prepared(setup, cache, images, f"the views of {images} images")


def prepared(setup: Setup, cache: RowCache, images: int, what: str) -> RowCache | None:
    """The cache, ready on each machine; None, with a line that says why, where it cannot be. Called on all ranks."""
    why = ""
    if setup.accelerator.is_local_main_process:
        try:
            if not cache.exists():
                why = why_no_room(cache.path.parent, images * cache.row_bytes, setup.settings.cache_gib, what)
            if not why and (said := cache.prepare(is_own=not setup.settings.cache_dir)):
                print(clean(said), flush=True)
        except OSError as error:
            why = f"{what} cannot be kept in {cache.path.parent} ({error.strerror}): they are made in each epoch"
    if whys := [found for found in gather_object([why]) if found]:  # the others wait here
        setup.accelerator.print(clean(f"note: {whys[0]}"))
        return None
    return cache


def data_of(shard_set: ShardSet) -> list[str]:
    """What a shard set's pictures are known by."""
    return [shard.sha256 for shard in shard_set.manifest.shards]


def decoder() -> list[str]:
    """What makes views of pictures, and may change their bits."""
    return [jpeg_decoder(), *(f"{name} {version(name)}" for name in ("simplejpeg", "pillow", "torch"))]


def remove_caches(run: Path) -> None:
    """Delete the run folder's own."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
