"""The pictures that a dataset's own list names, against those that are in its folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from shards.adapters.folder import files_in
from shards.adapters.lists import few, warn


def compare(names: Collection[str], folder: Path, listing: str, *, is_whole: bool) -> None:
    """Say once what is listed and not there and, where the list should be whole, what is there and not listed.

    Listed pictures that are missing are left to the build, which names each of them and skips a few.
    """
    named, there = set(names), set(files_in(folder))
    missing = sorted(named - there)
    unlisted = sorted(there - named) if is_whole else []
    if missing and len(missing) == len(named):
        raise FileNotFoundError(
            f"{listing} names {len(missing)} pictures ({few(missing)}), and {folder} holds none of them: "
            "--root must be the folder of this list's own pictures."
        )
    if missing:
        warn(
            f"{len(missing)} of the {len(named)} pictures that {listing} names are missing from {folder} "
            f"({few(missing)}): they are skipped if --max-skipped allows so many."
        )
    if unlisted:
        warn(
            f"{len(unlisted)} pictures in {folder} are not named in {listing} ({few(unlisted)}): "
            "they have no labels and are left out."
        )
