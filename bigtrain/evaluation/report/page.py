"""A self-contained page of figures and pictures about what a network has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from bigtrain.data.decode import Picture
from bigtrain.data.shard_set import ShardSet
from bigtrain.evaluation.report.overlays import picture_fields, rgb
from bigtrain.files import write_text
from bigtrain.pages import template

TEMPLATE = Path(__file__).with_name("pictures.html.jinja")


def card(shard_set: ShardSet, sample: int, kind: str, value: float) -> dict[str, Any]:
    """One picture of a strip; `kind`: known, novel or reference."""
    image = rgb(Picture(shard_set.read([sample])[0]).rgb())
    return picture_fields(image, shard_set.key(sample), shard_set.classes_of(sample)) | {
        "kind": kind,
        "value": f"{value:.3g}",
    }


class Strip(NamedTuple):
    label: str
    cards: Sequence[Mapping[str, Any]]


class Group(NamedTuple):
    title: str
    strips: Sequence[Strip]


class Section(NamedTuple):
    """Text, a table, a chart, an image and strips of pictures; what is empty is left out."""

    title: str
    text: Sequence[str] = ()
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    chart: Markup = Markup("")
    image: str = ""  # a data URI
    groups: Sequence[Group] = ()
    legend: Sequence[tuple[int, str]] = ()  # the chart's lines: number of the style, name


def write_page(path: Path, title: str, lead: Sequence[str], sections: Sequence[Section]) -> None:
    """Write the page whole or not at all; everything in it that comes from data is escaped."""
    page = template(TEMPLATE).render(title=title, lead=lead, sections=sections)
    write_text(path, page)
