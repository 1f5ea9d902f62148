"""A table of finished runs: for each setting the mean over seeds with its 95 % interval, and what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from bigtrain.evaluation.metrics import FIGURES

SWEEP_FILE = "sweep.json"
WHAT_IS_KNOWN = ("known", "novel", "half", "category")  # axes that a table averages over
MAX_NAMED = 20


@dataclass(frozen=True)
class Result:
    """One run: its place on each axis, and its figures; None while it is not finished."""

    name: str
    axes: Mapping[str, Any]
    figures: Mapping[str, Any] | None

    def value(self, metric: str) -> float | None:
        return None if self.figures is None else float(self.figures[metric]["value"])


def read_results(folder: Path, *, plain: bool = False) -> list[Result]:
    """The runs of a sweep, or those in the folders of a folder, told apart by the settings in which they differ.

    Args:
        plain: each run's plain figures too (nearest neighbours, a student that ignores the picture), one result each.

    Raises:
        ValueError: there are none.
    """
    if (folder / SWEEP_FILE).is_file():
        rows = json.loads((folder / SWEEP_FILE).read_text())["runs"]
        of_sweep = [Result(r["name"], r["axes"], figures(folder / r["name"])) for r in rows if not r["shared"]]
        return by_detector(of_sweep, plain=plain)
    runs = sorted(file.parent for file in folder.glob("*/config.json"))
    if not runs:
        raise ValueError(f"{folder} holds no runs: name the folder of a sweep, or one that holds runs' folders.")
    found = [figures(run) for run in runs]
    is_judged = [one is None or "auroc" in one or "detectors" in one for one in found]  # pretraining runs are not
    settings = [json.loads((run / "config.json").read_text())["settings"] for run in runs]
    compared = [one for one, judged in zip(settings, is_judged, strict=True) if judged]
    names = [
        n for n in dict.fromkeys(n for one in compared for n in one) if len({str(s[n]) for s in compared if n in s}) > 1
    ]
    axes = [{name: as_axis(one.get(name, "")) for name in names} for one in settings]
    results = [Result(run.name, axis, one) for run, axis, one in zip(runs, axes, found, strict=True)]
    return by_detector(results, are_alike=len({frozenset(one) for one in compared}) == 1, plain=plain)


def by_detector(results: list[Result], *, are_alike: bool = True, plain: bool = False) -> list[Result]:
    """A run of several detectors as one result each, with the axis "detector"; one without figures yet stands
    for all of them. Runs of unlike recipes have that axis too."""
    of_runs = [None if result.figures is None else of_detectors(result.figures, plain) for result in results]
    if are_alike and not plain and not any(result.figures and "detectors" in result.figures for result in results):
        return results
    varying = ("seed", *WHAT_IS_KNOWN)
    names: dict[Any, dict[str, None]] = {}  # what was judged per setting, over all seeds and known classes
    places = [tuple((name, str(value)) for name, value in r.axes.items() if name not in varying) for r in results]
    for place, one in zip(places, of_runs, strict=True):
        names.setdefault(place, {}).update(dict.fromkeys(one or ()))
    return [
        Result(result.name, {"detector": name, **result.axes}, its)
        for result, place, one in zip(results, places, of_runs, strict=True)
        for name, its in (dict.fromkeys(names[place] or [""]) if one is None else one).items()
    ]


def of_detectors(figures: Mapping[str, Any], plain: bool) -> dict[str, Any]:
    """What a run judged: its detector or detectors by name, and where asked for the plain figures."""
    own = figures.get("detectors") or {figures.get("method", ""): figures}
    return {**own, **figures.get("comparisons", {})} if plain else dict(own)


def as_axis(value: Any) -> Any:
    return "+".join(map(str, value)) if isinstance(value, list) else value


def figures(run: Path) -> Mapping[str, Any] | None:
    file = run / "results.json"
    return json.loads(file.read_text()) if file.is_file() else None


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean and its 95 % t-interval over seeds; of a single value there is no interval.

    m +- t(.975, n - 1) s / sqrt(n)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = float(student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Row:
    axes: tuple[Hashable, ...]
    seeds: int
    expected: int
    estimate: tuple[float, float | None, float | None] | None
    over_images: bool = False  # The interval, of a single seed; else it is over seeds.


def rows(results: Sequence[Result], metric: str) -> tuple[list[str], list[Row]]:
    """All axes except the seed, and a row for each combination on them; where the classes that are known vary, a row
    "mean" too: the mean over them for each seed that has all, then over seeds."""
    names = [name for name in results[0].axes if name != "seed"]
    seed_of = [result.axes.get("seed", 0) for result in results]
    columns = [with_seed_placeholder([result.axes[name] for result in results], seed_of) for name in names]
    groups: dict[tuple[Hashable, ...], dict[Any, float | None]] = {}
    own: dict[tuple[Hashable, ...], Result] = {}
    for result, *place_ in zip(results, *columns, strict=True):
        place = tuple(place_)
        groups.setdefault(place, {})[result.axes.get("seed", 0)] = result.value(metric)
        own[place] = result if result.figures else own.get(place, result)
    found = [with_own_interval(row_of(place, by_seed), own[place], metric) for place, by_seed in groups.items()]
    if over := next((names.index(name) for name in WHAT_IS_KNOWN if name in names), -1) + 1:
        means: dict[tuple[Hashable, ...], dict[tuple[Hashable, ...], dict[Any, float | None]]] = {}
        for place, by_seed in groups.items():
            means.setdefault((*place[: over - 1], "mean", *place[over:]), {})[place] = by_seed
        for place, members in means.items():
            if len(members) > 1:
                seeds = dict.fromkeys(seed for by_seed in members.values() for seed in by_seed)
                found.append(row_of(place, {seed: mean([m.get(seed) for m in members.values()]) for seed in seeds}))
    return names, found


def with_seed_placeholder(values: Sequence[Any], seeds: Sequence[Any]) -> list[Any]:
    """The values of an axis; those that name their seed, such as a network trained with it, as one: "net-{seed}".

    Each such value occurs with one seed, and every seed has one.
    """
    if len(set(seeds)) == 1:
        return list(values)
    named = [
        re.sub(rf"(?<!\d){re.escape(str(seed))}(?!\d)", "{seed}", value) if isinstance(value, str) else value
        for value, seed in zip(values, seeds, strict=True)
    ]
    seeds_of: dict[Any, set[Any]] = {}
    for value, name, seed in zip(values, named, seeds, strict=True):
        seeds_of.setdefault(("as it is", value), set()).add(seed)
        seeds_of.setdefault(("named", name), set()).add(seed)
    return [
        name if len(seeds_of["as it is", value]) == 1 and seeds_of["named", name] == set(seeds) else value
        for value, name in zip(values, named, strict=True)
    ]


def row_of(place: tuple[Hashable, ...], by_seed: Mapping[Any, float | None]) -> Row:
    there = [value for value in by_seed.values() if value is not None]
    return Row(place, len(there), len(by_seed), mean_and_interval(there) if there else None)


def with_own_interval(row: Row, result: Result, metric: str) -> Row:
    """A row of a single seed with the interval of its run, over images; there is none over seeds."""
    its = figure_of(result.figures or {}, metric)
    if row.seeds != 1 or row.estimate is None or "low" not in its or "high" not in its:
        return row
    return Row(
        row.axes, row.seeds, row.expected, (row.estimate[0], float(its["low"]), float(its["high"])), over_images=True
    )


def mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing: a mean over fewer classes is a different figure."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if len(there) == len(values) else None


def paired_differences(results: Sequence[Result], metric: str, against: str) -> list[Result]:
    """Each run's figure minus that of its counterpart, the run that differs from it in one axis only.

    Args:
        against: AXIS=VALUE, which the counterparts have.

    Returns:
        The differences as results of the same metric; without figures for the counterparts, and where there is none.

    Raises:
        ValueError: there is no such axis, or none of its values is this one.
    """
    axis, _, wanted = against.partition("=")
    values = {str(result.axes[axis]): None for result in results if axis in result.axes}
    if not values:
        there = f"use AXIS=VALUE with one of {', '.join(axes)}" if (axes := results[0].axes) else "they differ in none"
        raise ValueError(
            f"--against {against} names no axis of these runs: {there}; with --plain there is the axis detector too."
        )
    if wanted not in values:
        raise ValueError(f"--against {against}: no run has that {axis}; there are {'; '.join(values)}.")

    def place(result: Result) -> frozenset[tuple[str, str]]:
        return frozenset((name, str(value)) for name, value in result.axes.items() if name != axis)

    others = {place(result): result.value(metric) for result in results if str(result.axes.get(axis)) == wanted}
    found = []
    for result in results:
        own, other = result.value(metric), others.get(place(result)) if str(result.axes.get(axis)) != wanted else None
        both = None if own is None or other is None else {metric: {"value": own - other}}
        found.append(Result(result.name, result.axes, both))
    return found


def table(results: Sequence[Result], metric: str = "auroc", *, against: str = "") -> str:
    """Markdown, as a README takes it.

    Args:
        against: AXIS=VALUE; see `paired_differences`, which are two more columns.

    Raises:
        ValueError: the runs have no such figure, or the runs to compare with are missing.
    """
    has_it = [r.figures is None or bool(figure_of(r.figures, metric)) for r in results]
    if not any(result.figures and its for result, its in zip(results, has_it, strict=True)):
        done = [result.figures for result in results if result.figures]
        if known := dict.fromkeys(name for one in done for name in one if figure_of(one, name)):
            raise ValueError(f"the runs have no figure {metric!r}: there are {', '.join(known)}.")
        if done:
            raise ValueError("none of the runs was judged: their results hold no figure with an interval.")
    without = [result for result, its in zip(results, has_it, strict=True) if not its]
    results = [result for result, its in zip(results, has_it, strict=True) if its]
    names, found = rows(results, metric)
    in_percent = metric in FIGURES
    lines = [[*names, metric + ", %" * in_percent, "95 % interval", "seeds"]]
    for row in found:
        of = f" of {row.expected}" if row.seeds < row.expected else ""
        cells = [*map(str, row.axes), *estimate_cells(row.estimate, in_percent), f"{row.seeds}{of}"]
        lines.append([cell.replace("|", "\\|") for cell in cells])
    if against:
        lines[0] += [f"minus {against.partition('=')[2]}".replace("|", "\\|"), "95 % interval"]
        for line, row in zip(lines[1:], rows(paired_differences(results, metric, against), metric)[1], strict=True):
            line += estimate_cells(row.estimate, in_percent)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = [f"| {' | '.join(line)} |" for line in padded]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    if any(row.over_images for row in found):
        text += ["", "The interval of a single seed is over its images; those of several are over seeds."]
    if missing := list(dict.fromkeys(result.name for result in results if result.figures is None)):
        runs = len({result.name for result in results})
        text += ["", f"{len(missing)} of {runs} runs are missing: {first_of(missing)}"]
    if without:
        named = [" ".join(filter(None, (result.name, result.axes.get("detector")))) for result in without]
        text += ["", f"{len(without)} without {metric} are left out: {first_of(named)}"]
    return "\n".join(text)


def estimate_cells(estimate: tuple[float, float | None, float | None] | None, in_percent: bool) -> list[str]:
    """The cells of a figure and its interval."""
    if estimate is None:
        return ["", ""]
    middle, *ends = (
        "" if value is None else f"{100 * value:.1f}" if in_percent else f"{value:.4f}" for value in estimate
    )
    return [middle, " .. ".join(filter(None, ends))]


def first_of(names: Sequence[str]) -> str:
    return ", ".join([*names[:MAX_NAMED], *(["…"] if len(names) > MAX_NAMED else [])])


def figure_of(figures: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A figure with its interval, as a run's results hold it; empty where there is none of that name."""
    found = figures.get(name)
    return found if isinstance(found, dict) and "value" in found else {}
