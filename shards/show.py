"""What is in a shard set, as a table to read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from bigtrain.data.set_files import read_index, shards_url
from bigtrain.text import clean
from shards.existing_set import manifest_of

COLUMNS = ("image_size", "image_ext", "width", "height", "classes")
MAX_CLASSES = 40  # listed, unless all are asked for


def show(url: str, all_classes: bool = False) -> str:
    """Return the table; of a set of many classes it lists the first MAX_CLASSES, and says what the others have."""
    manifest, index = manifest_of(url), read_index(url, columns=COLUMNS)
    per_shard = [shard.samples for shard in manifest.shards]
    lines = [
        ("dataset", manifest.dataset),
        ("split", manifest.split),
        ("licence", manifest.licence),
        ("samples", thousands(manifest.samples)),
        ("shards", f"{len(per_shard)} of {span(min(per_shard, default=0), max(per_shard, default=0))} samples"),
        ("size", readable(sum(shard.bytes for shard in manifest.shards))),
    ]
    if manifest.shards_at:
        lines[-1] = ("size", f"{readable(pc.sum(index['image_size']).as_py() or 0)} of pictures, in {lines[-1][1]}")
        lines.append(("tars", f"at {shards_url(url, manifest)}; this is a view"))
    shown = pc.list_value_length(index["classes"])
    if index.num_rows:
        extent = {name: pc.min_max(index[name]).as_py() for name in ("width", "height", "image_size")}
        size, labels = extent["image_size"], pc.min_max(shown).as_py()
        formats = sorted(occurrences(index["image_ext"]).items())
        lines += [
            ("width", f"{span(extent['width']['min'], extent['width']['max'])} pixels"),
            ("height", f"{span(extent['height']['min'], extent['height']['max'])} pixels"),
            ("a picture", f"{readable(size['min'])} .. {readable(size['max'])}"),
            ("formats", ", ".join(f"{ext} {n}" for ext, n in formats)),
        ]
        average = "" if labels["min"] == labels["max"] else f", {pc.mean(shown).as_py():.3g} on average"
        lines.append(("labels", f"{span(labels['min'], labels['max'])} a picture{average}"))
    lines.append(("classes", f"{len(manifest.classes)}, by the number of images that show them:"))
    text = [f"{name:<10} {printable(value)}" for name, value in lines]
    return "\n".join(text + class_lines(manifest.classes, index, all_classes))


def class_lines(classes: tuple[str, ...], index: pa.Table, all_classes: bool) -> list[str]:
    """A line a class, in the order of the set; last, classes that only the index names, and images of none."""
    images = occurrences(pc.list_flatten(index["classes"]))  # distinct in a row, so this counts images
    listed = classes if all_classes else classes[:MAX_CLASSES]
    rows = [(name, images.get(name, 0)) for name in listed]
    rows += [(f"{name} (not in the manifest)", images[name]) for name in sorted(set(images) - set(classes))]
    if unlabelled := pc.sum(pc.equal(pc.list_value_length(index["classes"]), 0)).as_py():
        rows.append(("(no class)", unlabelled))
    width = max((len(printable(name)) for name, _ in rows), default=0)
    text = [f"  {printable(name):<{width}} {count:>8}" for name, count in rows]
    if rest := classes[len(listed) :]:
        counts = [images.get(name, 0) for name in rest]
        more = (
            f"  and {len(rest)} more classes, {span(min(counts), max(counts))} images each (--all-classes lists them)"
        )
        text.insert(len(listed), more)
    return text


def occurrences(names: pa.ChunkedArray) -> dict[str, int]:
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(names).to_pylist()}


def printable(text: str) -> str:
    """On one line, without what would move a terminal's cursor or colour it."""
    return clean(text).replace("\n", "?")


def thousands(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} .. {high}"


def readable(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
