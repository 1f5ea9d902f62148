"""A sweep file: base settings, axes and seeds become runs, each with a name, settings and a folder of its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.choices import checked_values, is_local
from bigtrain.data.protocol import expand
from bigtrain.data.set_files import read_manifest
from bigtrain.files import read_toml
from slurm.cluster import Cluster, read_cluster
from slurm.shipped import shipped, shipped_names

KEYS = {
    "recipe": str, "out": str, "cluster": str | dict, "max_parallel": int, "protocol": str, "classes": list,
    "seeds": list, "settings": dict, "axes": dict, "zip": list, "shared": list,
}  # fmt: skip
KEYS_OF_SHARED = {"name": str, "recipe": str, "per": list, "settings": dict, "leaves": dict}
LONGEST_NAME = 120


@dataclass(frozen=True)
class Run:
    name: str
    recipe: str
    settings: Mapping[str, Any]
    axes: Mapping[str, Any]  # What sets it apart from the others: the value of each axis, as tables show it.
    shared: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)  # file -> the shared run that writes it


@dataclass(frozen=True)
class Sweep:
    path: Path
    out: Path
    recipe: str
    cluster: Cluster
    max_parallel: int
    runs: tuple[Run, ...]

    def record(self) -> dict[str, Any]:
        """What status and tables read, in OUT/sweep.json."""
        runs = [{"name": run.name, "axes": run.axes, "shared": run.shared} for run in self.runs]
        further = {"recipe": self.recipe, "max_parallel": self.max_parallel}
        return {"sweep": self.path.name, **further, "runs": runs}


class Point(NamedTuple):
    """One value of an axis: what a table calls it, and the settings behind it."""

    label: Any
    settings: Mapping[str, Any]


def plan(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ValueError: an unknown key, an invalid value, or two identical runs.
    """
    given = read_toml(path, f"name a sweep file, or one that comes with bigtrain: {', '.join(shipped_names('sweep'))}")
    checked_values(str(path), given, KEYS, "key")
    if "recipe" not in given:
        raise ValueError(f"{path}: recipe is missing: which script runs, such as recipes/defend.py?")
    if (max_parallel := given.get("max_parallel", 100)) < 1:
        raise ValueError(f"{path}: max_parallel is {max_parallel}; it must be at least 1.")
    cluster = given.get("cluster", {})
    where = cluster if isinstance(cluster, str) else f"{path}: [cluster]"
    out = Path(given.get("out", f"runs/{path.stem}")).absolute()
    settings, recipe = given.get("settings", {}), given["recipe"]
    axes = axes_of(path, given, settings)
    if side := side_of(path, given, axes):
        axes = {side: [], **axes}
    shared = [(check_shared(path, table, axes), table) for table in given.get("shared", [])]
    runs: list[Run] = []
    classes_at: dict[str, Sequence[str]] = {}
    for combination in product(*([(name, point) for point in points] for name, points in axes.items() if points)):
        points = dict(combination)
        for split in splits(path, given, {**settings, **merged(points)}, classes_at) if side else [None]:
            runs += runs_at(out, recipe, settings, {side: split, **points} if split else points, shared)
    once = {(run.name, key(run)): run for run in runs if run.shared}
    whole = [*once.values(), *(run for run in runs if not run.shared)]
    return Sweep(
        path=path,
        out=out,
        recipe=recipe,
        cluster=read_cluster(shipped(Path(cluster), "cluster"))
        if isinstance(cluster, str)
        else Cluster().changed(where, **cluster),
        max_parallel=max_parallel,
        runs=tuple(with_unique_names(path, whole)),
    )


def merged(points: Mapping[str, Point]) -> dict[str, Any]:
    """The settings of several points."""
    return {name: value for point in points.values() for name, value in point.settings.items()}


def runs_at(
    out: Path,
    recipe: str,
    settings: Mapping[str, Any],
    points: Mapping[str, Point],
    shared: Iterable[tuple[str, Mapping[str, Any]]],
) -> Iterable[Run]:
    """The run at these points of the axes, after the shared runs that it needs."""
    own, needs = {**settings, **merged(points)}, dict[str, str]()
    for name, table in shared:
        first = shared_run(recipe, name, table, settings, points)
        for setting, file in table["leaves"].items():
            own[setting] = str(out / first.name / file)
            needs[own[setting]] = first.name
        yield first
    labels = {name: point.label for name, point in points.items()}
    yield Run(name_of(labels), recipe, own, labels, needs=needs)


def axes_of(path: Path, given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The file's own axes, in the order of the runs' names: seeds last."""
    axes: dict[str, list[Point]] = {}
    for name, values in given.get("axes", {}).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: the axis {name} is {values!r}; it must be a list of values.")
        axes[name] = [Point(label(value), {name: value}) for value in values]
    for table in given.get("zip", []):
        name, points = zipped(path, table)
        if name in axes:
            raise ValueError(f'{path}: two axes are named {name}: give a [[zip]] another, with axis = "…".')
        axes[name] = points
    if "seeds" in given:
        if any(type(seed) is not int for seed in given["seeds"]) or not given["seeds"]:
            raise ValueError(f"{path}: seeds is {given['seeds']!r}; it must be a list of whole numbers.")
        axes["seed"] = [Point(seed, {"seed": seed}) for seed in given["seeds"]]
    return axes


def side_of(path: Path, given: Mapping[str, Any], axes: Mapping[str, Sequence[Point]]) -> str:
    """What a protocol's axis is called; empty without a protocol."""
    if "protocol" not in given:
        if "classes" in given:
            raise ValueError(f"{path}: classes needs a protocol: add protocol, or an axis named known.")
        return ""
    named = {*given.get("settings", {}), *(n for points in axes.values() for point in points for n in point.settings)}
    if {"known", "novel"} & named:
        raise ValueError(f"{path}: protocol says what is known: leave known and novel out of settings and axes.")
    return {"all-vs-one": "novel", "half-vs-half": "half"}.get(given["protocol"], "known")


def splits(
    path: Path, given: Mapping[str, Any], settings: Mapping[str, Any], classes_at: dict[str, Sequence[str]]
) -> list[Point]:
    """The points of a protocol's axis for the classes that a file names, or those of the training shards."""
    train = settings.get("train")
    if "classes" not in given and not isinstance(train, str):
        raise ValueError(f"{path}: a protocol needs classes = [...], or settings.train, whose manifest names them.")
    if "classes" not in given and train not in classes_at:
        classes_at[str(train)] = read_manifest(str(train)).classes
    protocol, classes = given["protocol"], given.get("classes") or classes_at[str(train)]
    side = "novel" if protocol == "all-vs-one" else "known"
    halves = protocol == "half-vs-half"
    return [
        Point("+".join(split.known) if halves else getattr(split, side)[0], {side: list(getattr(split, side))})
        for split in expand(protocol, classes)
    ]


def zipped(path: Path, table: Any) -> tuple[str, list[Point]]:
    """Settings that change together: lists of the same length. `label` is what a table calls each, `axis` all."""
    table = dict(table) if isinstance(table, dict) else {}
    name = table.pop("axis", "row")
    if not table or not all(isinstance(values, list) and values for values in table.values()):
        raise ValueError(f"{path}: each setting of a [[zip]] must be a list of values: {table!r}.")
    if len({len(values) for values in table.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in table.items())
        raise ValueError(f"{path}: the lists of a [[zip]] must be of the same length: {lengths}.")
    labels = table.pop("label", None)
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    labels = labels or [" ".join(f"{k}={label(v)}" for k, v in row.items()) for row in rows]
    return name, [Point(one, row) for one, row in zip(labels, rows, strict=True)]


def label(value: Any) -> Any:
    return "+".join(map(str, value)) if isinstance(value, list) else value


def check_shared(path: Path, shared: Any, axes: Mapping[str, Any]) -> str:
    if not isinstance(shared, dict):
        raise ValueError(f"{path}: shared must be written as [[shared]] tables.")
    where = f"{path}: [[shared]]"
    checked_values(where, shared, KEYS_OF_SHARED, "key")
    if not shared.get("leaves") or "name" not in shared:
        raise ValueError(f'{where} needs name = "…" and leaves = {{setting = "file it leaves"}}.')
    for axis in shared.get("per", []):
        if axis not in axes:
            raise ValueError(f"{where}: per names {axis!r}, which is not an axis; the axes are {', '.join(axes)}.")
    return str(shared["name"])


def shared_run(
    recipe: str, name: str, shared: Mapping[str, Any], settings: Mapping[str, Any], points: Mapping[str, Point]
) -> Run:
    """The shared run needed at these points: the same for all runs that differ only in other axes."""
    own = dict(settings) if shared.get("recipe", recipe) == recipe else {}
    labels = {axis: points[axis].label for axis in shared.get("per", [])}
    for axis in labels:
        own |= points[axis].settings
    own |= shared.get("settings", {})
    return Run("-".join(filter(None, [name, name_of(labels)])), shared.get("recipe", recipe), own, labels, shared=True)


def name_of(labels: Mapping[str, Any]) -> str:
    """A folder's name: "dog-mask_ratio0.5-s0"."""
    bare = dict.fromkeys(("known", "novel", "half", "row", "dataset", "category"), "") | {"seed": "s"}
    words = [f"{bare.get(k, k)}{str(v).lower() if isinstance(v, bool) else in_name(v)}" for k, v in labels.items()]
    return re.sub(r"[^\w.+=-]+", "_", "-".join(words), flags=re.ASCII).lstrip(".-") or ("run" if words else "")


def in_name(value: Any) -> Any:
    """A value as part of a folder's name: of a path the end alone, its file without what it ends in."""
    if not isinstance(value, str) or "/" not in value:
        return value
    *_, folder, name = ["", *value.rstrip("/").split("/")]
    stem = Path(name).stem if is_local(name) else name
    return f"{folder}_{stem}" if stem != name and folder else stem


def key(run: Run) -> str:
    return json.dumps([run.recipe, run.settings], sort_keys=True, ensure_ascii=False)


def with_unique_names(path: Path, runs: Sequence[Run]) -> Iterable[Run]:
    """Names that two runs would share get a piece of a digest of their settings."""
    seen: dict[str, Run] = {}
    for run in runs:
        if (other := seen.setdefault(key(run), run)) is not run:
            raise ValueError(
                f"{path}: the runs {other.name} and {run.name} have the same settings: "
                f"{json.dumps(dict(run.axes), ensure_ascii=False)} appears twice."
            )
    count = Counter(run.name[:LONGEST_NAME].lower() or "run" for run in runs)
    for run in runs:
        name = run.name[:LONGEST_NAME] or "run"
        if count[name.lower()] > 1:
            name += "-" + hashlib.sha256(key(run).encode()).hexdigest()[:8]
        if name != run.name and run.shared:
            raise ValueError(f"{path}: the name of the shared run {run.name} is too long or not unique: change it.")
        yield replace(run, name=name)


def toml(settings: Mapping[str, Any]) -> str:
    """Settings as a recipe's --config reads them."""
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in settings.items())


def toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, float):
        return repr(value)  # inf and nan too
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
