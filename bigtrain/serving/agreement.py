"""Whether an exported model scores as its detector: both on the same real pictures, their figures side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bigtrain.data.decode import Picture
from bigtrain.detectors.image_detector import ImageDetector
from bigtrain.evaluation.intervals import share_interval
from bigtrain.evaluation.metrics import Estimate, auroc
from bigtrain.images import UnreadableError
from bigtrain.serving.exported import ExportedDetector, spread
from bigtrain.serving.sources import Reader, pictures_of
from bigtrain.text import counted

FEWEST = 200  # pictures
WITHIN = 1e-4  # standard deviations of the scores, and of the maps, in fp32
ROUNDING = 1e-9
EVERY_GREY, EVERY_ODD = 8, 8


@dataclass(frozen=True)
class Compared:
    """Pictures, whether each is novel (None: nobody knows), and where they come from."""

    payloads: Sequence[bytes]  # Encoded, for decoded ones would fill the memory.
    novel_N: NDArray[np.bool_] | None
    said: str

    def __str__(self) -> str:
        return self.said

    def images(self) -> Iterator[Image.Image]:
        """Each picture, some made grey, some cut to an odd size."""
        for number, payload in enumerate(self.payloads):
            yield varied(Picture(payload).rgb(), number)


def pictures_to_compare(folder: Path, images: str, most: int) -> Compared:
    """Pictures of the run's test split, half of them novel, or those of --images; some made grey, some cut to an odd
    size.

    Raises:
        ValueError: there are fewer than FEWEST.
    """
    if most < FEWEST:
        raise ValueError(f"--pictures {most}: at least {FEWEST} are compared.")
    if images:
        payloads, novel_N, source = read_some(images, most), None, images
    else:
        payloads, novel_N, source = of_run(folder, most)
    is_kept = [is_readable(payload) for payload in payloads]
    kept = [payload for payload, is_whole in zip(payloads, is_kept, strict=True) if is_whole]
    if len(kept) < FEWEST:
        raise ValueError(
            f"{source} has {counted(len(kept), 'picture')} that can be read, and an export is compared on at least "
            f"{FEWEST}: give more with --images."
        )
    novel_N = None if novel_N is None else novel_N[is_kept]
    greys = sum(number % EVERY_GREY == 0 for number in range(len(kept)))
    said = f"{len(kept)} pictures of {source}, {greys} of them made grey, as many cut to odd sizes"
    return Compared(kept, novel_N, said)


def is_readable(payload: bytes) -> bool:
    try:
        Picture(payload).rgb()
    except UnreadableError:
        return False
    return True


def varied(image: Image.Image, number: int) -> Image.Image:
    if number % EVERY_GREY == 0:
        return image.convert("L")
    if number % EVERY_ODD == 1 and min(image.size) > 4:
        width, height = image.size
        return image.crop((1, 0, width - (width % 2), height - 1 - (height % 2 == 0)))
    return image


def read_some(images: str, most: int) -> list[bytes]:
    names = []
    for named in pictures_of(images):
        names.append(named)
        if len(names) == most:
            break
    return [payload for payload in Reader(images).read(names) if isinstance(payload, bytes)]


def of_run(folder: Path, most: int) -> tuple[list[bytes], NDArray[np.bool_] | None, str]:
    """Pictures of the split that the detector's run was judged on; of a run on normal pictures alone, its own."""
    import pyarrow.parquet as pq

    from bigtrain.data.shard_set import ShardSet

    run = next((each for each in (folder.resolve().parent, folder.resolve().parents[1]) if is_run(each)), None)
    if run is None:
        raise ValueError(
            f"{folder} lies in no run, whose test pictures could be compared: give some with --images DIR."
        )
    settings = json.loads((run / "config.json").read_text())["settings"]
    columns = pq.read_table(run / "scores.parquet", columns=["key", "split", "novel"]).to_pydict()
    rows = dict.fromkeys(
        zip(columns["key"], columns["split"], columns["novel"], strict=True)
    )  # once, of many detectors
    has_test = any(split == "test" for _, split, _ in rows)
    wanted = [(key, novel) for key, split, novel in rows if not has_test or split == "test"]
    url = found_from(run, (settings.get("test") or settings["train"]) if has_test else settings["train"])
    try:
        shard_set = ShardSet(url)
    except (ValueError, OSError) as error:
        raise ValueError(f"the run's pictures are not at {url} any more: give some with --images DIR.") from error
    novel_N = np.array([bool(novel) for _, novel in wanted])
    rng = np.random.default_rng(0)
    known, novel = (rng.permutation(np.flatnonzero(novel_N == is_novel)) for is_novel in (False, True))
    half = min(len(novel), max(most // 2, most - len(known)))
    chosen = np.sort(np.concatenate([known[: most - half], novel[:half]]))
    sample_of = {key: sample for sample, key in enumerate(shard_set.keys())}
    chosen = np.array([i for i in chosen if wanted[i][0] in sample_of], int)
    payloads = shard_set.read([sample_of[wanted[i][0]] for i in chosen])
    return payloads, novel_N[chosen] if has_test else None, f"{url} ({'test split' if has_test else 'normal pictures'})"


def found_from(run: Path, url: str) -> str:
    """A set by the path that the run was given; a relative one is looked for beside the run's own folders too."""
    places = [url, *(str(parent / url) for parent in run.parents)]
    return next((place for place in places if Path(place, "manifest.json").is_file()), url)


def is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "scores.parquet").is_file()


@dataclass
class Agreement:
    rows: list[tuple[str, str]] = field(default_factory=list)
    why_not: str = ""

    @property
    def agrees(self) -> bool:
        return not self.why_not

    def table(self) -> str:
        wide = max(len(name) for name, _ in self.rows)
        return "\n".join(f"  {name:{wide}}  {value}" for name, value in self.rows)


def agreement(before: ImageDetector, after: ExportedDetector, compared: Compared, precision: str) -> Agreement:
    """Score all pictures by both.

    In fp32 no score and no map may differ by more than WITHIN standard deviations. In fewer bits, which needs pictures
    whose classes are known, the AUROC must stay inside of the detector's interval and, for the thresholds and p-values
    that the export keeps, the share of known pictures that it flags inside of what so many pictures leave open.

    Args:
        before: in fp32, whatever the run scored in.
    """
    one, two = (judged(detector, as_input(compared.images(), after)) for detector in (before, after))
    found = Agreement()
    off = {"score": differing(one["score"], two["score"])}
    if "map" in one:
        off["map"] = differing(one["map"], two["map"])
    for name, (absolute, relative) in off.items():
        limit = f", at most {WITHIN:g} allowed" if precision == "fp32" else ""
        found.rows.append(
            (f"largest difference of {name}", f"{absolute:.3g} ({relative:.2g} standard deviations{limit})")
        )
        if precision == "fp32" and not relative <= WITHIN:
            found.why_not = f"its {name} differs by {relative:.2g} standard deviations, more than {WITHIN:g}."
    if (threshold := before.scoring.threshold) is not None:
        changed = int(((one["score"] > threshold) != (two["score"] > threshold)).sum())
        found.rows.append(("decisions that change", f"{changed} of {len(one['score'])}"))
    if compared.novel_N is None or len(set(compared.novel_N.tolist())) < 2:
        if precision != "fp32":
            found.why_not = (
                f"whether {precision} is good enough is said by the AUROC, which needs known and novel pictures: "
                "export a run that was judged on both."
            )
        return found
    figures = [auroc(compared.novel_N, each["score"]) for each in (one, two)]
    found.rows += [
        (f"AUROC of the {name}", said(each)) for name, each in zip(("detector", "export"), figures, strict=True)
    ]
    if not figures[0].low <= figures[1].value <= figures[0].high:
        found.why_not = "its AUROC lies outside of the detector's interval."
    if threshold is not None:
        known_N = ~compared.novel_N
        flagged = [int((each["score"][known_N] > threshold).sum()) for each in (one, two)]
        low, high = share_interval(flagged[0], int(known_N.sum()))
        found.rows.append(("known pictures flagged", f"{flagged[0]} by the detector, {flagged[1]} by the export"))
        if not low - ROUNDING <= flagged[1] / known_N.sum() <= high + ROUNDING:
            found.why_not = "it flags another share of known pictures, so that its threshold is not the detector's."
    return found


def said(figure: Estimate) -> str:
    return f"{figure.value:.4f} ({figure.low:.4f} to {figure.high:.4f})"


def differing(one: NDArray[np.floating], two: NDArray[np.floating]) -> tuple[float, float]:
    """The largest difference, and by how many standard deviations; NaN where the export gives one."""
    largest = float(np.abs(np.asarray(one, np.float64) - np.asarray(two, np.float64)).max())
    return largest, largest / spread(np.asarray(one, np.float64))


def judged(detector: Any, images: Iterable[Image.Image]) -> dict[str, NDArray[np.floating]]:
    judgements = detector.judge(images)
    found = {"score": np.array([each.score for each in judgements])}
    if judgements[0].map_hw is not None:
        found["map"] = np.stack([each.map_hw for each in judgements])
    return found


def as_input(images: Iterable[Image.Image], after: ExportedDetector) -> Iterable[Image.Image]:
    """Pictures of the export's input size, where it resizes them itself: the detector is given the same."""
    if not after.record["resizes"]:
        return images
    view, rng = after.view(), np.random.default_rng(0)
    views = (view(Picture.of(image), rng)["image"] for image in images)
    return (Image.fromarray(each.transpose(1, 2, 0)) for each in views)
