"""An existing shard set: its manifest and classes, or a sentence on what lies there instead."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from pathlib import Path

from bigtrain.data.schema import MANIFEST_FILE, Manifest
from bigtrain.data.set_files import read_manifest
from bigtrain.images import IMAGE_EXTENSIONS
from shards.location import Location

SETTINGS_FILE = "build.json"  # of a build; without a manifest beside it, the build was interrupted
MAX_NAMED = 10  # sets in a folder of sets
MAX_LOOKED_AT = 1000  # names in a folder


def manifest_of(url: str) -> Manifest:
    """Like read_manifest, but where there is none the error says what is there instead."""
    place = Location(url)
    if place.folder is not None and place.folder.is_file():
        raise NotADirectoryError(f"{url} is a file: give the folder of a shard set, which holds its {MANIFEST_FILE}.")
    try:
        return read_manifest(url)
    except ValueError as error:
        if instead := what_is_there(place):
            raise ValueError(instead) from error
        raise


def what_is_there(place: Location) -> str:
    """A sentence on a place that is not a finished set; "" where read_manifest's own error is enough."""
    there = listed(place)
    if there is None or MANIFEST_FILE in there:
        return ""
    if SETTINGS_FILE in there:
        return f"{place} holds a build that was interrupted: run the same `bigtrain-shards build` again to continue it."
    if place.folder is None:
        return "" if there else f"there is nothing at {place}: check the address."
    if not place.folder.is_dir():
        return f"{place} does not exist: check the name, or make it with `bigtrain-shards build`."
    if sets := sorted(found.parent.name for found in place.folder.glob(f"*/{MANIFEST_FILE}")):
        more = f" and {len(sets) - MAX_NAMED} more" if len(sets) > MAX_NAMED else ""
        return f"{place} is not a shard set, it holds the sets {', '.join(sets[:MAX_NAMED])}{more}: give one of these."
    if pictures_in(place.folder):
        beside = place.folder.with_name(f"{place.folder.name}-shards")
        return (
            f"{place} holds pictures, not shards: `bigtrain-shards build folder --root {place} --out {beside}` makes "
            "shards of them."
        )
    return ""


def pictures_in(folder: Path) -> bool:
    """Whether a folder, or a folder in it, holds a picture by its name."""
    names = (path for pattern in ("*", "*/*") for path in itertools.islice(folder.glob(pattern), MAX_LOOKED_AT))
    return any(path.suffix[1:].lower() in IMAGE_EXTENSIONS for path in names)


def listed(place: Location) -> dict[str, int] | None:
    """Names and bytes of what lies there; None where a web server gives no list."""
    if place.folder is None and place.url.startswith(("http:", "https:")):
        return None
    return place.sizes()


def check_classes(url: str, manifest: Manifest, names: Iterable[str]) -> None:
    """Refuse the name of a class that the set does not have."""
    for name in names:
        if name not in manifest.classes:
            near = difflib.get_close_matches(name, manifest.classes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"`bigtrain-shards show {url} --all-classes` lists them."
            raise ValueError(f"{url} has no class {name!r} among its {len(manifest.classes)}: {hint}")
