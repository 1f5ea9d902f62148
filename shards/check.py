"""Is a shard set whole? Manifest, sizes, sha256, and each row of the index against the tar."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from typing import Any

import fsspec
import pyarrow as pa

from bigtrain.data.schema import MANIFEST_FILE, Manifest, Shard, filesystem, read_index, read_manifest
from shards.build import SKIPPED_FILE
from shards.members import members

MAX_NAMED = 20  # of one kind in one shard


def check(url: str, quick: bool = False) -> list[str]:
    """What is wrong with the set, a line each; `quick` looks at names, sizes and counts only.

    A folder without manifest is no shard set: that is a ValueError.
    """
    fs, path = filesystem(url)
    try:
        manifest = read_manifest(url)
    except ValueError as error:
        if fs.exists(f"{path}/{MANIFEST_FILE}"):
            return [str(error)]
        raise
    wrong: list[str] = []
    try:
        index = read_index(url)
    except (ValueError, OSError, pa.ArrowException) as error:
        index, wrong = None, [str(error)]
    if index is not None:
        wrong += counts(manifest, index)
    skipped = skipped_keys(fs, path)
    named = {shard.file for shard in manifest.shards}
    there = {found.rsplit("/", 1)[-1] for found in fs.ls(path, detail=False)}
    wrong += [f"{name}: not in the manifest" for name in sorted(there - named) if name.endswith(".tar")]
    rows_of = rows_by_shard(index, len(manifest.shards)) if index is not None and not quick else None
    for number, shard in enumerate(manifest.shards):
        if shard.file not in there:
            wrong.append(f"{shard.file}: missing")
            continue
        size = fs.size(f"{path}/{shard.file}")
        if size != shard.bytes:
            wrong.append(f"{shard.file}: {size} bytes, and the manifest says {shard.bytes}")
        if not quick:
            wrong += content(fs, f"{path}/{shard.file}", shard, rows_of[number] if rows_of else None, skipped)
    return wrong


def counts(manifest: Manifest, index: pa.Table) -> list[str]:
    """Keys once, as many rows for each shard as the manifest says, no class that it does not name."""
    wrong = [
        f"index: the key {key!r} is there {times} times"
        for key, times in Counter(index["key"].to_pylist()).items()
        if times > 1
    ]
    rows = Counter(index["shard"].to_pylist())
    for number, shard in enumerate(manifest.shards):
        if rows.pop(number, 0) != shard.samples:
            there = index["shard"].to_pylist().count(number)
            wrong.append(f"index: {there} rows for {shard.file}, and the manifest says {shard.samples}")
    wrong += [f"index: {times} rows for a shard number {number} that is not there" for number, times in rows.items()]
    unknown = set(index["classes"].combine_chunks().flatten().to_pylist()) - set(manifest.classes)
    wrong += [f"index: the class {name!r} is not in the manifest" for name in sorted(unknown)]
    return wrong


def rows_by_shard(index: pa.Table, shards: int) -> list[list[dict[str, Any]]]:
    rows: list[list[dict[str, Any]]] = [[] for _ in range(shards)]
    for row in index.select(["key", "shard", "image_offset", "image_size", "image_ext"]).to_pylist():
        if 0 <= row["shard"] < shards:
            rows[row["shard"]].append(row)
    return rows


def content(
    fs: fsspec.AbstractFileSystem,
    path: str,
    shard: Shard,
    rows: list[dict[str, Any]] | None,
    skipped: set[str],
) -> list[str]:
    """One shard: its sha256, and its pictures against its rows."""
    wrong: list[str] = []
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    if digest.hexdigest() != shard.sha256:
        wrong.append(f"{shard.file}: sha256 {digest.hexdigest()[:12]}..., and the manifest says {shard.sha256[:12]}...")
    pictures: dict[str, tuple[int, int, str]] = {}
    twice: list[str] = []
    try:
        with fs.open(path, "rb") as file:
            for member in members(file):
                if member.is_image:
                    if member.key in pictures:
                        twice.append(f"{shard.file}: the key {member.key!r} has two pictures")
                    pictures[member.key] = (member.offset, member.size, member.ext.lower())
    except (tarfile.TarError, OSError) as error:
        wrong.append(f"{shard.file}: no whole tar ({error})")
    if rows is None:
        return wrong + shortened(twice, shard)
    unlike: list[str] = []
    for row in rows:
        said = (row["image_offset"], row["image_size"], row["image_ext"])
        found = pictures.pop(row["key"], None)
        if found is None:
            unlike.append(f"{shard.file}: {row['key']} is in the index, not in the tar")
        elif found != said:
            unlike.append(
                f"{shard.file}: {row['key']}.{found[2]} lies at {found[0]} with {found[1]} bytes, "
                f"and the index says .{said[2]} at {said[0]} with {said[1]}"
            )
    unlike += [f"{shard.file}: {key} is in the tar, not in the index" for key in pictures if key not in skipped]
    return wrong + shortened(twice, shard) + shortened(unlike, shard)


def shortened(lines: list[str], shard: Shard) -> list[str]:
    more = len(lines) - MAX_NAMED
    return lines if more <= 0 else [*lines[:MAX_NAMED], f"{shard.file}: and {more} more like these"]


def skipped_keys(fs: fsspec.AbstractFileSystem, path: str) -> set[str]:
    """Pictures that `index` found unreadable: in the tar, not in the index."""
    try:
        lines = fs.cat_file(f"{path}/{SKIPPED_FILE}").decode().splitlines()
        return {json.loads(line)["key"] for line in lines}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return set()
