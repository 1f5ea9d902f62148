"""Views of a shard set: an index of some of its samples and a manifest that says where the tars lie; no tar is copied.

Which samples a view takes follows from the seed, the keys and the classes alone: not from the order of the rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest
from bigtrain.data.set_files import filesystem, read_index, shards_url
from bigtrain.files import remove_abandoned, whole_file, whole_folder, write_text
from shards.disk import space_for
from shards.existing_set import check_classes, manifest_of

Rows = NDArray[np.int64]
MAX_NAMED = 3  # classes in the split of a view


def split_shares(url: str, out: Path, parts: Sequence[tuple[str, Fraction]], seed: int) -> dict[str, Manifest]:
    """Write the views out/<name>, one a share; each sample of the set lies in exactly one of them."""
    check_new(out)
    shares = dict(parts)
    if len(shares) < len(parts):
        raise ValueError(f"--shares names {[name for name, _ in parts]}: give each share a name of its own.")
    if sum(shares.values()) != 1:
        raise ValueError(
            f"the shares add up to {float(sum(shares.values())):g}, and every sample goes to one: "
            "let them add up to 1, with a share for what is left."
        )
    manifest, index = manifest_of(url), read_index(url)
    dealt = deal(index, shares, seed)
    if empty := [name for name, rows in dealt.items() if not len(rows)]:
        raise ValueError(
            f"the share {empty[0]}={float(shares[empty[0]]):g} of {index.num_rows} samples is not one: give it more."
        )
    splits = {name: f"{name}: {float(share):g} of {manifest.split}, seed {seed}" for name, share in shares.items()}
    return write_views(
        url, out, index, {name: (replace(manifest, split=splits[name]), rows) for name, rows in dealt.items()}
    )


def split_classes(url: str, out: Path, classes: Sequence[str]) -> Manifest:
    """Write the view of the samples that show any of these classes; what else they show stays in their rows."""
    check_new(out)
    manifest, index = manifest_of(url), read_index(url)
    check_classes(url, manifest, classes)
    row_of_object, class_of_object, names = objects(index)
    rows = np.unique(row_of_object[np.isin(class_of_object, [names[c] for c in classes if c in names])])
    if not len(rows):
        raise ValueError(f"no sample of {url} shows {' or '.join(classes)}: the view would be empty.")
    shown = set(pc.unique(pc.list_flatten(index["classes"].take(pa.array(rows)))).to_pylist()) | set(classes)
    taken = ", ".join(classes[:MAX_NAMED]) + (f" and {len(classes) - MAX_NAMED} more" * (len(classes) > MAX_NAMED))
    manifest = replace(
        manifest,
        split=f"{manifest.split} ({taken})",
        classes=tuple(name for name in manifest.classes if name in shown),
        folder_order=tuple(name for name in manifest.folder_order if name in shown),
    )
    return write_views(url, out, index, {"": (manifest, rows)})[""]


def split_per_class(url: str, out: Path, per_class: int, seed: int) -> tuple[Manifest, dict[str, int]]:
    """Write the view of N random samples of each class; returns also the classes that have fewer, with how many.

    A sample that shows several classes is taken if it is among the N of any. The N are among the N + 1 of the same
    seed.
    """
    check_new(out)
    manifest, index = manifest_of(url), read_index(url)
    row_of_object, class_of_object, names = objects(index)
    order = np.lexsort((drawn(index["key"], seed)[row_of_object], class_of_object))
    of_class = class_of_object[order]
    rank = np.arange(len(order)) - np.searchsorted(of_class, of_class)
    rows = np.unique(row_of_object[order[rank < per_class]])
    if not len(rows):
        raise ValueError(f"no sample of {url} shows any class: --per-class takes none.")
    images = np.bincount(class_of_object, minlength=len(names))
    have = {name: int(images[names[name]]) if name in names else 0 for name in manifest.classes}
    described = replace(manifest, split=f"{per_class} a class of {manifest.split}, seed {seed}")
    written = write_views(url, out, index, {"": (described, rows)})[""]
    return written, {name: count for name, count in have.items() if count < per_class}


def deal(index: pa.Table, shares: Mapping[str, Fraction], seed: int) -> dict[str, Rows]:
    """The rows of each share, rising.

    Each sample counts to the rarest class it shows (or to none). The samples stand class by class, in random order
    within each, and are dealt evenly along that line: so every class, and every part of it, is divided as the whole.
    """
    row_of_object, class_of_object, names = objects(index)
    images = np.bincount(class_of_object, minlength=len(names))
    by_name = np.argsort(np.array(list(names), dtype=object), kind="stable") if names else np.empty(0, np.int64)
    rarity = np.empty(len(names), np.int64)  # of a class: 0 is the rarest, among equals the first by name
    rarity[by_name[np.argsort(images[by_name], kind="stable")]] = np.arange(len(names))
    rarest = np.full(index.num_rows, len(names), np.int64)
    np.minimum.at(rarest, row_of_object, rarity[class_of_object])
    place = drawn(pa.chunked_array([list(names), ["\0no class"]], pa.string()), seed)  # classes stand in random order
    place_of_rarity = np.append(place[:-1][np.argsort(rarity)], place[-1])
    left = np.lexsort((drawn(index["key"], seed), place_of_rarity[rarest]))

    parts = {name: int(share * 10**6) for name, share in shares.items()}
    remaining, dealt = sum(parts.values()), {}
    for name, part in parts.items():
        quota = (np.arange(len(left) + 1) * part + remaining // 2) // remaining  # of the first 0, 1, 2 ... samples
        taken = np.diff(quota) > 0
        dealt[name] = np.sort(left[taken])
        left, remaining = left[~taken], remaining - part
    return dealt


def objects(index: pa.Table) -> tuple[Rows, Rows, dict[str, int]]:
    """For each class that a row lists: the row's number and the class's; and the numbers of the class names."""
    encoded = pc.list_flatten(index["classes"]).combine_chunks().dictionary_encode()
    row_of_object = pc.list_parent_indices(index["classes"].combine_chunks()).to_numpy()
    names = {name: number for number, name in enumerate(encoded.dictionary.to_pylist())}
    return row_of_object, encoded.indices.to_numpy().astype(np.int64), names


def drawn(names: pa.ChunkedArray, seed: int) -> NDArray[np.uint64]:
    """A random number for each name: the first 64 bits of the BLAKE2 hash of seed and name."""
    start = hashlib.blake2b(f"{seed}\0".encode(), digest_size=8)
    digests = bytearray()
    for batch in (names.slice(at, 1 << 16) for at in range(0, len(names), 1 << 16)):  # few strings at a time
        for name in batch.to_pylist():
            digest = start.copy()
            digest.update(name.encode())
            digests += digest.digest()
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def write_views(url: str, out: Path, index: pa.Table, views: dict[str, tuple[Manifest, Rows]]) -> dict[str, Manifest]:
    """Write the views (manifest of the whole set, rows) to out/<name> in a folder that gets its name at the end."""
    out = out.absolute()
    tars = shards_url(url, manifest_of(url))
    remove_abandoned(out.parent, out.name)
    with space_for(str(out)), whole_folder(out, "durable") as unfinished:
        written = {}
        for name, (manifest, rows) in views.items():
            (unfinished / name).mkdir(parents=True, exist_ok=True)
            rows_of_view = index.take(pa.array(rows))
            written[name] = write_view(unfinished / name, manifest, rows_of_view, shards_at(tars, out / name))
    return written


def write_view(folder: Path, manifest: Manifest, index: pa.Table, shards_at: str) -> Manifest:
    """Write index, then manifest; shards of which no sample is taken are left out of both."""
    samples = np.bincount(index["shard"].to_numpy(), minlength=len(manifest.shards))
    used = np.flatnonzero(samples)
    if used[-1] >= len(manifest.shards):
        raise ValueError(
            f"the index names a shard {used[-1]} and the manifest has {len(manifest.shards)}: make the index again "
            "with `bigtrain-shards index`."
        )
    shards = tuple(replace(manifest.shards[number], samples=int(samples[number])) for number in used)
    position = np.searchsorted(used, index["shard"].to_numpy()).astype(np.int32)
    index = index.set_column(index.schema.get_field_index("shard"), index.schema.field("shard"), pa.array(position))
    with whole_file(folder / INDEX_FILE) as file:
        pq.write_table(index, file, row_group_size=65536)
    manifest = replace(manifest, shards=shards, shards_at=shards_at)
    write_text(folder / MANIFEST_FILE, manifest.to_json())
    return manifest


def shards_at(tars: str, view: Path) -> str:
    """The way from a view to the tars: the path between them where both are local, so that they can move together.

    Where a link lies between the two, ".." would not lead back over it, and the whole address is given.
    """
    fs, path = filesystem(tars)
    if not isinstance(fs, LocalFileSystem):
        return tars
    way = os.path.relpath(path, view)
    if way == os.path.relpath(Path(path).resolve(), view.resolve()):
        return way
    return f"file://{Path(path).resolve()}"


def check_new(out: Path) -> None:
    """Refuse to write where something is already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a folder that is not empty" if out.is_dir() else "a file"
        raise ValueError(f"--out {out} is {what}: give a new or empty folder.")
