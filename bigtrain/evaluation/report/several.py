"""`bigtrain report A B C`: several runs in one page, with the differences that the same test pictures allow to tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.stats import norm

from bigtrain.evaluation.intervals import CONFIDENCE, Bools, Floats, bias_corrected_interval, resampled_counts
from bigtrain.evaluation.metrics import IN_REPORT, Estimate, checked, structural_components, summary
from bigtrain.evaluation.report.charts import SERIES, band_chart, roc_points
from bigtrain.evaluation.report.page import Section, write_page
from bigtrain.evaluation.report.sections import bands, precision_points
from bigtrain.text import counted

RESAMPLES = 1000


@dataclass(frozen=True)
class Judged:
    """A detector's scores of a run's test split, by key."""

    name: str
    novel_of: Mapping[str, bool]
    score_of: Mapping[str, float]


def report(runs: Sequence[Path], out: Path) -> None:
    """Write the page.

    Raises:
        ValueError: a folder holds no scores, or two runs share no test pictures.
    """
    if out.suffix != ".html":
        raise ValueError(f"--out {out} must end in .html.")
    names = [run.name for run in runs]
    every = [judged for run in runs for judged in read(run, run.name if names.count(run.name) == 1 else str(run))]
    keys = sorted(set.intersection(*(set(each.novel_of) for each in every)))
    first = every[0]
    for each in every[1:]:
        if sum(first.novel_of[key] != each.novel_of[key] for key in keys):
            raise ValueError(
                f"{each.name} and {first.name} call different pictures novel: only runs of one protocol are compared."
            )
    novel_N = np.array([first.novel_of[key] for key in keys], bool)
    if not len(keys) or novel_N.all() or not novel_N.any():
        raise ValueError(
            f"the runs share {counted(len(keys), 'test picture')}, and a comparison needs known and novel ones: give "
            "runs that were judged on the same set."
        )
    score_AN = np.array([[each.score_of[key] for key in keys] for each in every])
    write_page(out, title_of(every), lead_of(every, novel_N), sections_of(every, novel_N, score_AN))


def read(run: Path, called: str) -> list[Judged]:
    """A run's detectors; several where it has a table of them."""
    file = run / "scores.parquet"
    if not file.is_file():
        raise ValueError(f"{run} holds no scores.parquet: give finished runs.")
    table = pq.read_table(file).to_pydict()
    if not {"key", "split", "novel", "score"} <= table.keys():
        raise ValueError(f"{file} is not of a run that was judged: give the folders of finished runs.")
    columns = (table.get(name, [""] * len(table["key"])) for name in ("detector", "key", "split", "novel", "score"))
    rows = zip(*columns, strict=True)
    by_name: dict[str, list[tuple[str, bool, float]]] = {}
    for detector, key, split, novel, score in rows:
        if split == "test":
            by_name.setdefault(detector, []).append((key, novel, score))
    if not by_name:
        raise ValueError(f"{run} was judged on no test split, so nothing can be compared: give others.")
    return [
        Judged(
            f"{called}: {name}" if name else called,
            {key: novel for key, novel, _ in its},
            {key: score for key, _, score in its},
        )
        for name, its in by_name.items()
    ]


def title_of(every: Sequence[Judged]) -> str:
    return f"{len(every)} detectors on the same pictures"


def lead_of(every: Sequence[Judged], novel_N: Bools) -> list[str]:
    return [
        f"{int((~novel_N).sum())} known and {int(novel_N.sum())} novel test pictures that all of them have scored. "
        f"Differences are to {every[0].name}, paired by picture: an interval without 0 is a difference that these "
        "pictures tell. They say nothing of other seeds: give runs of several for that, or use bigtrain tables."
    ]


def sections_of(every: Sequence[Judged], novel_N: Bools, score_AN: Floats) -> list[Section]:
    names = [each.name for each in every]
    summaries = [summary(novel_N, score_N) for score_N in score_AN]
    headings = ["detector", *(figure.heading for figure in IN_REPORT.values())]
    rows = [
        [name, *(cell(found[figure]) for figure in IN_REPORT)] for name, found in zip(names, summaries, strict=True)
    ]
    sections = [Section("Figures", ["In percent, with 95 % intervals."], headings, rows)]
    if len(every) > 1:
        differences = [
            [name, *(signed(each) for each in paired(novel_N, score_AN[0], score_N).values())]
            for name, score_N in zip(names[1:], score_AN[1:], strict=True)
        ]
        text = [
            "In percent, with 95 % intervals: DeLong's for AUROC, a bootstrap that draws the same images for both for "
            "the others. * marks those without 0. The runs' own intervals may overlap where a difference is told."
        ]
        sections.append(Section(f"Differences to {names[0]}", text, headings, differences))
    roc_band, precision_band = bands(novel_N, score_AN[0])
    curves = {name: roc_points(novel_N, score_N) for name, score_N in zip(names, score_AN, strict=True)}
    precisions = {name: precision_points(novel_N, score_N) for name, score_N in zip(names, score_AN, strict=True)}
    legend = [(number % SERIES, name) for number, name in enumerate(names)]
    of_first = [f"The band is that of {names[0]}."]
    sections.append(
        Section("ROC curves", of_first, legend=legend, chart=band_chart(
            curves, roc_band, has_diagonal=True, x_label="known flagged (false positives)",
            y_label="novel found (true positives)", described="ROC curves",
        ))
    )  # fmt: skip
    sections.append(
        Section("Precision and recall", of_first, legend=legend, chart=band_chart(
            precisions, precision_band, x_label="novel found (recall)", y_label="novel among flagged (precision)",
            described="Precision-recall curves",
        ))
    )  # fmt: skip
    return sections


def cell(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:.1f}\n{100 * figure['low']:.1f}\u00a0to\u00a0{100 * figure['high']:.1f}"


def signed(difference: Estimate) -> str:
    told = "" if difference.low <= 0 <= difference.high else " *"
    return f"{100 * difference.value:+.1f}{told}\n{100 * difference.low:+.1f}\u00a0to\u00a0{100 * difference.high:+.1f}"


def paired(novel_N: Bools, one_N: Floats, two_N: Floats, *, seed: int = 0) -> dict[str, Estimate]:
    """Each figure of the second scores less that of the first, of the same images, with its 95 % interval.

    AUROC by DeLong, DeLong & Clarke-Pearson 1988: the variance of the difference is that of the differences of the
    structural components. The others by a stratified bootstrap that draws the same images for both.
    """
    _, one_N = checked(novel_N, one_N)
    _, two_N = checked(novel_N, two_N)
    found = {"auroc": delong_difference(novel_N, one_N, two_N)}
    resamples = min(RESAMPLES, max(200, 20_000_000 // len(novel_N)))
    # of one seed it draws the same images for any scores: by their places, the known ones first
    counts = zip(*(resampled_counts(novel_N, each, seed, resamples) for each in (one_N, two_N)), strict=True)
    drawn: dict[str, list[Floats]] = {}
    for first, second in counts:
        for name, figure in IN_REPORT.items():
            if figure.of_counts is not None:
                drawn.setdefault(name, []).append(figure.of_counts(*second) - figure.of_counts(*first))
    for name, figure in IN_REPORT.items():
        if figure.of_scores is not None and name in drawn:
            value = figure.of_scores(novel_N, two_N) - figure.of_scores(novel_N, one_N)
            found[name] = Estimate(value, *bias_corrected_interval(value, np.concatenate(drawn[name])))
    return found


def delong_difference(novel_N: Bools, one_N: NDArray[Any], two_N: NDArray[Any]) -> Estimate:
    (v10_one, v01_one), (v10_two, v01_two) = (structural_components(novel_N, each) for each in (one_N, two_N))
    novel_M, known_N = v10_two - v10_one, v01_two - v01_one
    value = float(novel_M.mean())
    if min(len(novel_M), len(known_N)) < 2:
        return Estimate(value, -1.0, 1.0)
    variance = novel_M.var(ddof=1) / len(novel_M) + known_N.var(ddof=1) / len(known_N)
    half = float(norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt(variance))
    return Estimate(value, value - half, value + half)
