"""What a table of scores comes to: counts, the most novel pictures and, where classes are known, the real rates."""

from __future__ import annotations

import heapq
from collections import Counter
from pathlib import Path
from typing import Any

from bigtrain.detectors.calibration import Calibration, Threshold
from bigtrain.serving.sources import Named
from bigtrain.serving.table_files import Row
from bigtrain.text import class_name, clean, counted

NAMED = 5  # pictures that could not be read, in the summary


class Counts:
    """Counts rows as they are written; holds the `top` most novel of them.

    Args:
        known: classes whose pictures are known; the pictures of others count as novel. None: nobody knows.
    """

    def __init__(self, top: int = 0, known: frozenset[str] = frozenset()) -> None:
        self.top, self.known = top, known
        self.pictures = self.unreadable = self.novel = self.eligible = 0  # eligible: for the most novel, not of before
        self.first_unreadable: list[str] = []
        self.flagged: Counter[tuple[bool, bool]] = Counter()  # (is known, is flagged)
        self._highest: list[tuple[float, int, Row, Named]] = []

    def seen(self, row: Row, named: Named | None) -> Row:
        """Count a row; `named`: where its picture is, None of an earlier table's."""
        self.pictures += 1
        if row["why_not"]:
            self.unreadable += 1
            if len(self.first_unreadable) < NAMED:
                self.first_unreadable.append(f"{row['path']}: {row['why_not']}")
        self.novel += bool(row["novel"])
        if self.known and row["shows"] and row["novel"] is not None:
            is_known = not self.known.isdisjoint(map(class_name, row["shows"].split(",")))
            self.flagged[is_known, bool(row["novel"])] += 1
        self.eligible += named is not None
        if self.top and named is not None and row["score"] is not None:
            heapq.heappush(self._highest, (row["score"], -self.pictures, row, named))
            if len(self._highest) > self.top:
                heapq.heappop(self._highest)
        return row

    def most_novel(self) -> list[tuple[Row, Named]]:
        return [(row, named) for *_, row, named in sorted(self._highest, reverse=True, key=lambda each: each[:2])]

    def record(self) -> dict[str, Any]:
        return {"pictures": self.pictures, "unreadable": self.unreadable, "novel": self.novel}


def summary_lines(
    counts: Counts,
    threshold: Threshold | None,
    calibration: Calibration,
    out: Path,
    scored: int,
    seconds: float,
    by: str = "now",
) -> str:
    """What the command says at its end; `scored` pictures are what this process has added, `by` says so."""
    lines = [f"{out}: {counted(counts.pictures, 'picture')}"]
    if scored:
        lines[0] += f", {scored} of them {by}, at {scored / max(seconds, 1e-9):.4g} pictures/s"
    if threshold is None:
        lines.append("no threshold: give --threshold, or set one with `bigtrain calibrate`")
    else:
        readable = max(counts.pictures - counts.unreadable, 1)
        share = f"{100 * counts.novel / readable:.3g} %"
        lines.append(f"{counts.novel} novel ({share}), above the threshold {threshold.value:.6g}")
        if threshold.low is not None and threshold.high is not None:
            lines[-1] += (
                f"; of normal pictures it flags {100 * threshold.low:.2g} to {100 * threshold.high:.2g} % (95 % "
                f"interval, by {counted(len(calibration), 'held-out picture')})"
            )
    lines += real_rates(counts)
    if counts.unreadable:
        more = f" and {counts.unreadable - NAMED} more" if counts.unreadable > NAMED else ""
        lines.append(f"{counts.unreadable} could not be read: {'; '.join(map(clean, counts.first_unreadable))}{more}")
    return "\n".join(lines)


def real_rates(counts: Counts) -> list[str]:
    """What the threshold really gave, where the pictures' classes are known."""
    from bigtrain.evaluation.intervals import share_interval

    lines = []
    for is_known, what in ((True, "known pictures were flagged"), (False, "novel pictures were missed")):
        of = counts.flagged[is_known, True] + counts.flagged[is_known, False]
        count = counts.flagged[is_known, is_known]
        if of:
            low, high = (100 * end for end in share_interval(count, of))
            lines.append(f"{count} of {of} {what}: {100 * count / of:.3g} % ({low:.2g} to {high:.2g} %)")
    return lines
