"""What is in a shard set, as a table to read."""

from __future__ import annotations

from collections import Counter

import pyarrow.compute as pc

from bigtrain.data.schema import read_index, read_manifest


def show(url: str) -> str:
    manifest, index = read_manifest(url), read_index(url)
    total = sum(shard.bytes for shard in manifest.shards)
    per_shard = [shard.samples for shard in manifest.shards]
    lines = [
        ("dataset", manifest.dataset),
        ("split", manifest.split),
        ("licence", manifest.licence),
        ("samples", f"{manifest.samples:,}".replace(",", " ")),
        ("shards", f"{len(per_shard)} of {span(min(per_shard, default=0), max(per_shard, default=0))} samples"),
        ("size", readable(total)),
    ]
    if index.num_rows:
        extent = {name: pc.min_max(index[name]).as_py() for name in ("width", "height", "image_size")}
        size = extent["image_size"]
        lines += [
            ("width", f"{span(extent['width']['min'], extent['width']['max'])} pixels"),
            ("height", f"{span(extent['height']['min'], extent['height']['max'])} pixels"),
            ("a picture", f"{readable(size['min'])} .. {readable(size['max'])}"),
            ("formats", ", ".join(f"{ext} {n}" for ext, n in sorted(Counter(index["image_ext"].to_pylist()).items()))),
        ]
    shown = index["classes"].combine_chunks()
    images = Counter(shown.flatten().to_pylist())  # distinct in a row, so this counts images
    unlabelled = sum(1 for n in pc.list_value_length(shown).to_pylist() if not n)
    lines.append(("classes", f"{len(manifest.classes)}, by the number of images that show them:"))
    text = [f"{name:<10} {value}" for name, value in lines]
    width = max((len(name) for name in manifest.classes), default=0)
    text += [f"  {name:<{width}} {images[name]:>8}" for name in manifest.classes]
    if unlabelled:
        text.append(f"  {'(no class)':<{width}} {unlabelled:>8}")
    return "\n".join(text)


def span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} .. {high}"


def readable(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
