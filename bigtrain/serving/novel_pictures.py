"""What `bigtrain score` leaves beside its table: maps, copies of novel pictures, a page of the most novel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigtrain.data.decode import Picture
from bigtrain.detectors.calibration import Judgement
from bigtrain.detectors.picture_judge import PictureJudge
from bigtrain.files import whole_file
from bigtrain.images import UnreadableError
from bigtrain.serving.sources import Named, Reader, chunks, is_address

if TYPE_CHECKING:
    from bigtrain.evaluation.report.overlays import Scale
    from bigtrain.serving.score_job import Options
    from bigtrain.serving.summary import Counts

MAX_SIDE = 512  # pixels of an overlay


@dataclass
class Extras:
    """The folders that are filled on the way; None: not asked for."""

    maps: Path | None
    maps_raw: Path | None
    copies: Path | None
    links: Path | None
    reader: Reader
    scale: Scale | None = None
    first: int = 0  # The number of the first picture: how many an earlier table has.
    missed: list[str] = field(default_factory=list)  # Pictures that were gone when they were to be written.

    @classmethod
    def of(cls, options: Options, detector: PictureJudge) -> Extras:
        """Raises ValueError: maps of a detector that has none."""
        if (options.maps or options.maps_raw) and detector.map_side is None:
            raise ValueError(
                "--maps needs a detector that scores patch by patch, and this one scores whole pictures: leave it out, "
                "or take a detector of recipes/defend.py."
            )
        if options.page is not None and not options.page.absolute().parent.is_dir():
            raise ValueError(f"--page {options.page}: its folder does not exist: make it, or name another.")
        reader = Reader(options.images, may_be_private=options.allow_private)
        if options.link_novel and (reader.shard_set is not None or options.images.endswith(".tar")):
            raise ValueError(f"--link-novel: pictures in {options.images} are no files of their own: use --copy-novel.")
        return cls(options.maps, options.maps_raw, options.copy_novel, options.link_novel, reader)

    def begin(self) -> None:
        for folder in (self.maps, self.maps_raw, self.copies, self.links):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)

    def tell(self) -> None:
        """What could not be written."""
        if self.missed:
            more = f" and {len(self.missed) - 3} more" if len(self.missed) > 3 else ""
            print(f"not copied, linked or drawn, for they are gone: {', '.join(self.missed[:3])}{more}", flush=True)
        if self.maps and self.scale is None:
            print(
                "--maps: none of the first 64 pictures could be read, so no scale was found and none drawn", flush=True
            )

    def fix_scale(self, detector: PictureJudge, reader: Reader, first: Sequence[Named]) -> None:
        """Span the colours by the maps of the first pictures: the same in every process and after a restart."""
        if detector.map_side is None:
            return
        from bigtrain.evaluation.report.overlays import scale_of

        payloads = [payload for payload in reader.read(first) if isinstance(payload, bytes)] if self.maps else []
        maps = detector.score_map(payloads)
        if maps is not None and len(readable := [each for each in maps if np.isfinite(each).all()]):
            self.scale = scale_of(readable)

    def write(self, number: int, named: Named, judged: Judgement) -> None:
        name = safe_name(self.first + number, named.name)
        if self.maps_raw and judged.map_hw is not None:
            with whole_file(self.maps_raw / f"{name}.npy", "renamed") as file:
                np.save(file, judged.map_hw)
        if self.maps and judged.map_hw is not None and self.scale is not None:
            from bigtrain.evaluation.report.overlays import overlay

            if (payload := self._read(named)) is not None:
                image = Picture(payload).rgb()
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                with whole_file(self.maps / f"{name}.png", "renamed") as file:
                    overlay(image, judged.map_hw, self.scale).save(file, "PNG")
        if not judged.novel:
            return
        if self.links:
            self._link(named, self.links / with_ending(name, named))
        if self.copies and (payload := self._read(named)) is not None:
            with whole_file(self.copies / with_ending(name, named), "renamed") as file:
                file.write(payload)

    def _read(self, named: Named) -> bytes | None:
        (payload,) = self.reader.read([named])
        if isinstance(payload, bytes):
            return payload
        self.missed.append(named.name)
        return None

    def _link(self, named: Named, link: Path) -> None:
        if is_address(named.place) or not Path(named.place).is_file():
            self.missed.append(named.name)
            return
        with suppress(FileExistsError):  # of an earlier start
            link.symlink_to(Path(named.place).absolute())


def safe_name(number: int, name: str) -> str:
    """A name of letters, digits and dashes for a file about a picture: nothing of the picture's own name can lead out
    of a folder."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name.partition("?")[0]).stem)[:80].strip("-")
    return f"{number:08d}-{stem or 'picture'}"


def with_ending(name: str, named: Named) -> str:
    ending = re.sub(r"[^A-Za-z0-9.]", "", Path(named.name.partition("?")[0]).suffix)[:6]
    return name + ending


def is_picture(payload: bytes | Exception) -> TypeGuard[bytes]:
    try:
        return isinstance(payload, bytes) and bool(Picture(payload).rgb())
    except UnreadableError:
        return False


def write_page_of(options: Options, counts: Counts, detector: PictureJudge, extras: Extras) -> None:
    """The page of the most novel pictures."""
    from bigtrain.evaluation.report.overlays import overlay, page_image, picture_fields, rgb, scale_of
    from bigtrain.evaluation.report.page import Group, Section, Strip, write_page

    assert options.page is not None
    cards: list[dict[str, Any]] = []
    shown: list[tuple[Image.Image, NDArray[np.float32] | None]] = []
    for some in chunks(counts.most_novel(), detector.scoring.batch):  # maps of a batch cost no more than of a picture
        payloads = extras.reader.read([named for _, named in some])
        whole = [(row, payload) for (row, _), payload in zip(some, payloads, strict=True) if is_picture(payload)]
        maps = detector.score_map([payload for _, payload in whole])  # else it has changed since it was scored
        for place, (row, payload) in enumerate(whole):
            image = rgb(Picture(payload).rgb())
            shown.append((image, None if maps is None else maps[place]))
            p_value = "" if row["p_value"] is None else f", p {row['p_value']:.3g}"
            kind = "" if row["novel"] is None else "novel" if row["novel"] else "known"
            cards.append(
                picture_fields(image, row["path"], [row["class"]] if row["class"] else [])
                | {"kind": kind, "value": f"{row['score']:.4g}{p_value}", "caption": row["path"]}
            )
    present = [map_hw for _, map_hw in shown if map_hw is not None]
    if present:
        scale = scale_of(present)
        for card, (image, map_hw) in zip(cards, shown, strict=True):
            card["overlay"] = "" if map_hw is None else page_image(overlay(image, map_hw, scale))
    lead = [
        f"The {len(cards)} highest scores of {counts.eligible} pictures of {options.images}, by {options.detector}. "
        "Scores are novelty: higher = more novel. p is the share of held-out normal pictures that score as high."
    ]
    write_page(options.page, "Most novel pictures", lead, [Section("", groups=[Group("", [Strip("", cards)])])])
    print(f"the most novel pictures: {options.page}", flush=True)
