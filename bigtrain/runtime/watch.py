"""A live page of a run in the terminal, from the files in its folder; no torch, so it starts at once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bigtrain.runtime.follow_log import Follower, LoggedStage, is_number, shown
from bigtrain.text import clean, clock

NO_FIGURES = {"stage", "step", "steps", "time", "event", "text", "left_s", "keys"}
BLOCKS = " ▁▂▃▄▅▆▇█"
QUIET_AT_LEAST_S = 60.0


def watch(run: Path, *, every_s: float = 2.0, once: bool = False, console: Console | None = None) -> None:
    """Show a page of a run until it ends; once, where there is no terminal.

    Raises:
        ValueError: there is no run in the folder.
    """
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is not a run: name the folder that a recipe's --out named (config.json lies in it).")
    if not (math.isfinite(every_s) and every_s > 0):
        raise ValueError(f"--every is {every_s}; it must be above 0 seconds.")
    console = console or Console()
    follower = Follower(run / "log.jsonl")
    follower.look()
    if once or not console.is_terminal or console.is_dumb_terminal:
        console.print(page(run, follower, console.width))
        return
    with Live(page(run, follower, console.width), console=console, screen=False, auto_refresh=False) as live:
        while state(run, follower)[1]:
            time.sleep(every_s)
            follower.look()
            live.update(page(run, follower, console.width), refresh=True)
        live.update(page(run, follower, console.width), refresh=True)  # it may have ended since the page was drawn


def page(run: Path, follower: Follower, width: int) -> Panel:
    """What is known of a run now."""
    how, _ = state(run, follower)
    parts: list[Any] = [Text(how, style="bold")]
    if follower.stages:
        parts += [Text(), progress(follower)]
    if stage := follower.newest:
        figures = [shown({k: v}) for k, v in stage.last.items() if k not in NO_FIGURES and is_number(v)]
        parts += [Text(), Columns([Text(clean(figure)) for figure in figures], padding=(0, 3))]
        if len(stage.losses) > 1:
            parts += [Text(), curve(stage, width - 4)]
    lines = [f"{time.strftime('%H:%M:%S', time.localtime(float(e['time'])))}  {described(e)}" for e in follower.events]
    if lines:
        parts += [Text(), Text(clean("\n".join(lines)), style="dim", overflow="ellipsis", no_wrap=True)]
    if newest := newest_checkpoint(run):
        age_s = time.time() - newest.stat().st_mtime
        parts.append(Text(clean(f"newest checkpoint: {newest.parent.name}/{newest.name}, {clock(age_s)} ago")))
    return Panel(Group(*parts), title=Text(clean(str(run))), title_align="left")


def state(run: Path, follower: Follower) -> tuple[str, bool]:
    """How a run is, in words, and whether there is anything to wait for."""
    if (run / "results.json").is_file():
        return f"finished{result(run)}", False
    event = follower.events[-1] if follower.events else {}
    if (run / "stopped.json").is_file():
        return "stopped on request; the same command continues", False
    if event.get("event") == "failed":
        return f"failed: {clean(str(event.get('text', '')))}; the same command continues", False
    if not follower.times:
        return "has not begun a stage yet", True
    age_s = time.time() - follower.times[-1]
    gaps = [b - a for a, b in pairwise(follower.times)]
    if age_s > max(QUIET_AT_LEAST_S, 5 * median(gaps or [0])):
        return f"no news for {clock(age_s)}: judging, saving, or no longer running", True
    return "running", True


def result(run: Path) -> str:
    try:
        record = json.loads((run / "results.json").read_text())
        if "auroc" in record:
            return ": AUROC {value:.3f} (95 % interval {low:.3f} to {high:.3f})".format(**record["auroc"])
        return f": top-1 {record['top1']:.3f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def progress(follower: Follower) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    for column in ({}, {"ratio": 1}, {"justify": "right"}, {"justify": "right"}):
        table.add_column(no_wrap=True, **column)
    for stage in follower.stages.values():
        left = stage.last.get("left_s")
        done = stage.steps and stage.step >= stage.steps
        table.add_row(
            Text(clean(stage.name)),
            ProgressBar(total=stage.steps or 1, completed=stage.step if stage.steps else 0),
            f"{stage.step} of {stage.steps or '?'}",
            "done" if done else f"{clock(float(left))} left" if left is not None and is_number(left) else "",
        )
    return table


def curve(stage: LoggedStage, width: int) -> Text:
    """The loss of a stage in one line of blocks, each the mean of some rows; low is good."""
    values = [loss for _, loss in stage.losses]
    low, high = min(values), max(values)
    ends = f"{high:.4g}", f"{low:.4g}"
    count = max(1, min(len(values), width - len("loss    to ") - 1 - sum(map(len, ends))))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    scale = (len(BLOCKS) - 2) / (high - low) if high > low else 0
    line = "".join(BLOCKS[1 + round((mean - low) * scale)] for mean in means)
    return Text(f"loss  {line}  {ends[1]} to {ends[0]}", no_wrap=True, overflow="crop")


def newest_checkpoint(run: Path) -> Path | None:
    found = [p for p in run.glob("checkpoints/*/step-*") if p.name.removeprefix("step-").isdigit()]
    try:
        return max(found, key=lambda p: p.stat().st_mtime, default=None)
    except OSError:  # removed meanwhile
        return None


def described(event: Mapping[str, Any]) -> str:
    return f"{event['stage']} {event['step']}: {event['event']}, {event.get('text', '')}".rstrip(", ")
