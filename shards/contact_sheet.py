"""A contact sheet: one HTML file with pictures of each class, boxes and masks drawn, to find wrong labels by eye."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFilter, ImageOps

from bigtrain.data.schema import Manifest
from bigtrain.data.set_files import filesystem, read_index, shards_url
from bigtrain.files import write_text
from bigtrain.images import UnreadableError, decode_rgb
from bigtrain.pages import data_uri, template
from shards.existing_set import check_classes, manifest_of
from shards.mask_codec import marked_pixels
from shards.read_samples import Drawing, Found, read_neighbours
from shards.show import readable, thousands

TEMPLATE = Path(__file__).with_name("contact_sheet.html.jinja")
MAX_SIDE = 360  # pixels of a picture in the page; larger ones are scaled down
PIXEL_ART = 128  # pictures up to this side keep their pixels: PNG, enlarged with sharp edges
STAGE = (288, 240)  # about the size of a picture on the page, which sets the size of the letters
AT_A_TIME = 64  # pictures whose bytes are held at once
MAX_BOXES = 300  # drawn in one picture
MASK_COLOUR = (255, 45, 149)
TINT, OUTLINE = 80, 255  # opacity, of 255


class Group(NamedTuple):
    """Pictures that were drawn for one class; "" is no class."""

    name: str
    images: int  # of the set that show the class
    rows: list[int]


@dataclass
class Card:
    """What the page shows of one picture."""

    key: str
    source: str
    facts: str  # pixels, bytes, format
    image: str = ""  # a data URI; empty: it cannot be read, and the notes say why
    mask: str = ""
    width: int = 0
    height: int = 0
    letters: float = 0.0  # height of the letters in pixels of the picture
    has_small_pixels: bool = False
    boxes: list[dict[str, Any]] = field(default_factory=list)
    classes: list[tuple[str, str, int]] = field(default_factory=list)  # name, colour, number of boxes
    masked: str = ""  # the share of the picture; empty: it has no mask
    has_json: bool = False
    notes: list[str] = field(default_factory=list)


def write_page(url: str, path: Path, count: int = 120, seed: int = 0, classes: Sequence[str] = ()) -> tuple[int, int]:
    """Write the contact sheet of the set at `url` to `path`, whole or not at all.

    Args:
        url: folder or URL of a shard set or a view.
        path: the page, which ends in .html; an older page is replaced.
        count: pictures on the page, dealt to the classes in turn; fewer where the set has fewer.
        seed: of the choice.
        classes: only pictures that show one of these; without it all, and those of no class.

    Returns:
        How many pictures are on the page, and how many of them cannot be shown.
    """
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--page {path} does not end in .html: give the page such a name.")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError(f"--page {path} cannot be a file: give a name in a folder that exists.")
    manifest, index = manifest_of(url), read_index(url)
    check_classes(url, manifest, classes)
    groups = choose(index, list(classes) or [*manifest.classes, ""], count, seed)
    if not groups:
        raise ValueError(
            f"{url} holds no picture{' of ' + ' or '.join(classes) if classes else ''}: there is none to show."
        )
    colours = {name: colour(number) for number, name in enumerate(manifest.classes)}
    cards = read_cards(url, manifest, index, groups, colours)
    sections = [(group, colours.get(group.name), [next(cards) for _ in group.rows]) for group in groups]
    everything = [card for _, _, some in sections for card in some]
    page = template(TEMPLATE, thousands=thousands).render(
        manifest=manifest,
        url=url,
        seed=seed,
        shown=len(everything),
        sections=sections,
        classes=len(classes) or len(manifest.classes),
        named=sum(1 for group in groups if group.name),
        boxed=any(card.boxes for card in everything),
        masked=any(card.masked for card in everything),
        dense=not any(card.boxes or (card.image and not card.has_small_pixels) for card in everything),
        without_json=sum(not card.has_json for card in everything),
    )
    write_text(path, page)
    return len(everything), sum(not card.image for card in everything)


def choose(index: pa.Table, names: Sequence[str], count: int, seed: int) -> list[Group]:
    """Deal `count` random pictures to the classes in turn, each picture once; classes that get none are left out."""
    rng = np.random.default_rng(seed)
    shown = index["classes"].combine_chunks()
    number_of = pc.index_in(shown.flatten(), pa.array(names, pa.string())).fill_null(-1).to_numpy()
    row_of = pc.list_parent_indices(shown).to_numpy()
    if "" in names:
        unlabelled = np.flatnonzero(pc.equal(pc.list_value_length(shown), 0).to_numpy(zero_copy_only=False))
        number_of = np.append(number_of, np.full(len(unlabelled), names.index("")))
        row_of = np.append(row_of, unlabelled)
    shuffled = rng.permutation(len(row_of))
    order = shuffled[np.argsort(number_of[shuffled], kind="stable")]
    ends = np.searchsorted(number_of[order], np.arange(len(names) + 1))
    waiting = {int(c): iter(row_of[order[ends[c] : ends[c + 1]]]) for c in rng.permutation(len(names))}
    chosen: dict[int, list[int]] = {}
    taken: set[int] = set()
    while waiting and len(taken) < count:
        for number in list(waiting)[: count - len(taken)]:
            row = next((int(row) for row in waiting[number] if int(row) not in taken), None)
            if row is None:
                del waiting[number]
                continue
            taken.add(row)
            chosen.setdefault(number, []).append(row)
    return [Group(names[n], int(ends[n + 1] - ends[n]), sorted(chosen[n])) for n in sorted(chosen)]


def colour(number: int) -> str:
    """Neighbours get hues far apart (the golden angle); light enough to be seen on a dark picture."""
    return f"hsl({number * 137.508 % 360:.0f} 100% {(66, 76, 60)[number % 3]}%)"


def read_cards(
    url: str, manifest: Manifest, index: pa.Table, groups: list[Group], colours: dict[str, str]
) -> Iterator[Card]:
    """The cards of all groups in order, read a few at a time."""
    fs, folder = filesystem(shards_url(url, manifest))
    places = [(row, group.name) for group in groups for row in group.rows]
    for start in range(0, len(places), AT_A_TIME):
        some = places[start : start + AT_A_TIME]
        rows = index.take(pa.array([row for row, _ in some])).to_pylist()
        found = read_neighbours(fs, folder, manifest, rows)
        for row, (_, group), members in zip(rows, some, found, strict=True):
            yield card(row, group, members, colours)


def card(row: dict[str, Any], group: str, found: Found, colours: dict[str, str]) -> Card:
    drawing = Drawing.of(found.json)
    facts = f"{row['width']} x {row['height']}, {readable(row['image_size'])}, {row['image_ext']}"
    notes = [*found.notes, *drawing.notes]
    made = Card(row["key"], drawing.source, facts, has_json=found.json is not None, notes=notes)
    for name in sorted(
        {*row["classes"], *(name for *_, name in drawing.boxes)}, key=lambda name: (name != group, name)
    ):
        made.classes.append((name, colours.get(name, "#888"), sum(1 for *_, boxed in drawing.boxes if boxed == name)))
    try:
        image = Image.fromarray(decode_rgb(found.picture))
    except UnreadableError as reason:
        made.notes.insert(0, str(reason))
        return made
    made.width, made.height = image.size
    if image.size != (row["width"], row["height"]):
        made.notes.append(f"the picture is {image.width} x {image.height}, and the index says otherwise")
    made.has_small_pixels = max(image.size) <= PIXEL_ART
    made.letters = round(11 / min(STAGE[0] / image.width, STAGE[1] / image.height), 3)
    small = thumbnail_size(image.size)
    made.image = data_uri(image.resize(small, Image.Resampling.LANCZOS, reducing_gap=3.0), made.has_small_pixels)
    if found.mask is not None:
        draw_mask(made, found.mask, small)
    draw_boxes(made, drawing, group, colours)
    return made


def draw_boxes(made: Card, drawing: Drawing, group: str, colours: dict[str, str]) -> None:
    """Boxes from large to small, so that none lies hidden under another; boxes that cannot be right are named."""
    boxes = sorted(drawing.boxes, key=lambda box: (box[0] - box[2]) * (box[3] - box[1]))
    for top, left, bottom, right, name in boxes[:MAX_BOXES]:
        shape = {"x": left, "y": top, "width": max(right - left, 0), "height": max(bottom - top, 0)}
        made.boxes.append({**shape, "name": name, "colour": colours.get(name, "#888"), "of_group": name == group})
    place_names(made)
    if len(boxes) > MAX_BOXES:
        made.notes.append(f"the largest {MAX_BOXES} of {len(boxes)} boxes are drawn")
    outside = sum(t < -1 or le < -1 or b > made.height + 1 or r > made.width + 1 for t, le, b, r, _ in boxes)
    empty = sum(b <= t or r <= le for t, le, b, r, _ in boxes)
    for number, what in ((outside, "reach beyond the picture"), (empty, "are empty")):
        if number:
            made.notes.append(f"{number} of {len(boxes)} boxes {what}")


def place_names(made: Card) -> None:
    """Inside a box with room for its name, else above it; a name that would cover another is not drawn."""
    tall = made.letters * 1.15
    placed: list[tuple[float, float, float]] = []
    for box in sorted(made.boxes, key=lambda box: not box["of_group"]):
        wide = 0.62 * made.letters * len(box["name"])
        has_room = box["height"] > 2.5 * tall and box["width"] > wide
        x = max(0.0, min(box["x"] + 0.2 * made.letters, made.width - wide))
        y = min(max(box["y"] + tall * (0.95 if has_room else -0.3), tall), made.height)
        if all(abs(y - y2) >= tall or x + wide <= x2 or x2 + wide2 <= x for x2, y2, wide2 in placed):
            placed.append((x, y, wide))
            box |= {"name_x": round(x, 2), "name_y": round(y, 2)}


def thumbnail_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, MAX_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def draw_mask(made: Card, encoded: bytes, size: tuple[int, int]) -> None:
    """A tint and outline over every pixel that is not 0; none is lost when the picture is made smaller."""
    try:
        marked = marked_pixels(encoded)
    except UnreadableError as reason:
        made.notes.append(f"its mask cannot be read: {reason}")
        return
    if marked.shape != (made.height, made.width):
        made.notes.append(f"its mask is {marked.shape[1]} x {marked.shape[0]} and is not drawn")
        return
    made.masked = f"{100 * marked.mean():.2g} %" if marked.any() else "nothing"
    enlarged = max(1, math.ceil(240 / max(size)))  # the outline of a small picture is thinner than its pixels
    over = (size[0] * enlarged, size[1] * enlarged)
    coverage = Image.fromarray(marked.astype(np.float32)).resize(size, Image.Resampling.BOX)
    seen = Image.fromarray(((np.asarray(coverage) > 0) * 255).astype(np.uint8)).resize(over, Image.Resampling.NEAREST)
    inner = ImageOps.crop(ImageOps.expand(seen, 2).filter(ImageFilter.MinFilter(3)), 2)
    opacity = np.where(np.asarray(seen) == 0, 0, np.where(np.asarray(inner) == 0, OUTLINE, TINT)).astype(np.uint8)
    overlay = Image.new("RGBA", over, (*MASK_COLOUR, 0))
    overlay.putalpha(Image.fromarray(opacity))
    made.mask = data_uri(overlay, is_png=True)
