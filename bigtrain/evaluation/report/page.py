"""A self-contained page of figures and pictures about what a network has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.data.decode import Picture
from bigtrain.data.shard_set import ShardSet
from bigtrain.evaluation.report.overlays import page_image, rgb
from bigtrain.files import write_text
from bigtrain.pages import template

TEMPLATE = Path(__file__).with_name("pictures.html.jinja")


@dataclass(frozen=True)
class Card:
    """One picture of a strip."""

    shard_set: ShardSet
    sample: int
    kind: str  # known, novel, reference
    value: float

    def shown(self) -> dict[str, Any]:
        image = rgb(Picture(self.shard_set.read([self.sample])[0]).rgb())
        return {
            "key": self.shard_set.key(self.sample),
            "classes": ", ".join(self.shard_set.classes_of(self.sample)) or "no class",
            "kind": self.kind,
            "value": f"{self.value:.3g}",
            "image": page_image(image),
            "width": image.width,
            "height": image.height,
            "small": max(image.size) < 128,
        }


@dataclass(frozen=True)
class Strip:
    label: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Group:
    title: str
    strips: Sequence[Strip]


@dataclass(frozen=True)
class Section:
    """Text, a table, an image and strips of pictures; what is empty is left out."""

    title: str
    text: Sequence[str] = ()
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    image: str = ""  # a data URI
    groups: Sequence[Group] = field(default_factory=tuple)


def write_page(path: Path, title: str, lead: Sequence[str], sections: Sequence[Section]) -> None:
    """Write the page whole or not at all; everything in it that comes from data is escaped."""
    page = template(TEMPLATE).render(title=title, lead=lead, sections=[shown(s) for s in sections])
    write_text(path, page)


def shown(section: Section) -> dict[str, Any]:
    groups = [
        {
            "title": group.title,
            "strips": [{"label": s.label, "cards": [card.shown() for card in s.cards]} for s in group.strips],
        }
        for group in section.groups
    ]
    return {**vars(section), "groups": groups}
