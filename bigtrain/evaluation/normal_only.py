"""What can be said of a detector from normal pictures alone: held-out scores, a threshold with its false alarms, and
which pictures look most unusual. There are no figures of novelty: nothing novel is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from bigtrain.data.protocol import Split
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.detectors.image_detector import ImageDetector
from bigtrain.evaluation.collect import collect, mean_over
from bigtrain.evaluation.intervals import false_alarms
from bigtrain.evaluation.judge import near_threshold, write_own_card
from bigtrain.evaluation.metrics import explained
from bigtrain.evaluation.report.page import Group, Section, Strip, card, write_page
from bigtrain.evaluation.report.report import flattened
from bigtrain.evaluation.scored import (
    UNLABELLED,
    Scored,
    all_skipped,
    judged_images,
    scored_and_classified,
    write_scores,
)

SHOWN = 18  # pictures of a strip, in full rows
LEVELS = (0.5, 0.9, 0.95, 0.99, 1.0)  # quantiles of held-out scores that the report lists

Read = Callable[[ShardSet, NDArray[np.int64]], Stream]


def judge_normal(
    folder: Path,
    accelerator: Accelerator,
    detector: ImageDetector,
    split: Split,
    read: Read,
    *,
    method: str,
    bank_N: NDArray[np.int64],
    settings: Mapping[str, Any],
    seed: int,
    quantile: float = 0.95,
    floors: Mapping[str, ImageDetector] | None = None,
) -> dict[str, Any]:
    """Score, calibrate on held-out normal pictures, write detector/, scores.parquet and report.html to the run folder.

    Called on all ranks; the first one writes. Arguments as of `judge`; among `bank_N`, of training, the most unusual
    are shown. Returns the record of results.json, the same on all ranks.
    """
    constants = {
        name: partial(d.constant_score, constant=mean_over(accelerator, read(split.train, bank_N), d.target))
        for name, d in (floors or {}).items()
    }
    scorer = {"score": partial(scored_and_classified, detector, False)}
    streams: list[Stream] = []
    parts: list[Scored] = []
    errors = dict[str, NDArray[np.float64]]()
    for name, shard_set, sample_N in (
        ("held_out", split.train, split.held_out_N),
        ("train", split.train, bank_N),
        (UNLABELLED, split.test, split.unlabelled_N),
    ):
        if not len(sample_N):
            continue
        streams.append(read(shard_set, sample_N))
        seen_N, found = collect(accelerator, streams[-1], scorer | (constants if name == "held_out" else {}))
        if name == "held_out":
            errors = {key: found[key] for key in constants}
        parts.append(Scored(shard_set, name, seen_N, np.zeros(len(seen_N), bool), found["score"][:, 0]))
    by_name = {part.split: part for part in parts}
    held_out = by_name["held_out"].score_N if "held_out" in by_name else np.zeros(0)
    threshold = detector.calibrate(held_out, quantile)
    results: dict[str, Any] = {
        "method": method,
        "normal_only": True,
        "threshold": threshold_of(threshold, held_out, by_name.get(UNLABELLED)),
        **judged_images(split, seed, len(held_out), skipped_by_set(split, streams)),
    }
    if errors and len(held_out):
        results["explained"] = explained(held_out, next(iter(errors.values())), seed=seed)._asdict()
    if accelerator.is_main_process:
        detector.save(folder / "detector")
        near = near_threshold(by_name["held_out"], threshold) if len(held_out) else []
        write_own_card(folder / "detector", method, results, settings, split, near=near)
        write_scores(folder / "scores.parquet", parts)
        lead = [f"{split}. There are no novel pictures, so no figure says how well novelty is found."]
        shown = [*figures_of(results, held_out), *strips_of(by_name), settings_of(settings)]
        write_page(folder / "report.html", f"{method}: normal pictures only", lead, shown)
    accelerator.wait_for_everyone()
    return results


def skipped_by_set(split: Split, streams: Sequence[Stream]) -> dict[str, dict[str, str]]:
    of_test = [stream for stream in streams if stream.shard_set is split.test and split.test is not split.train]
    return {"train": all_skipped([stream for stream in streams if stream not in of_test]), "test": all_skipped(of_test)}


def threshold_of(
    threshold: float | None, held_out_N: NDArray[np.float64], unlabelled: Scored | None
) -> dict[str, Any] | None:
    """The threshold, the false alarms that so many held-out pictures promise, what it flags among the unlabelled."""
    if threshold is None:
        return None
    low, high = false_alarms(len(held_out_N), int((held_out_N > threshold).sum()))
    found: dict[str, Any] = {"value": threshold, "false_alarms": {"low": low, "high": high}}
    if unlabelled is not None:
        found |= {"unlabelled": len(unlabelled.score_N), "flagged": int((unlabelled.score_N > threshold).sum())}
    return found


def figures_of(results: Mapping[str, Any], held_out_N: NDArray[np.float64]) -> list[Section]:
    text = ["No picture was held out, so there is no threshold."]
    if threshold := results["threshold"]:
        low, high = (100 * threshold["false_alarms"][end] for end in ("low", "high"))
        text = [
            f"Threshold {threshold['value']:.6g}, from {len(held_out_N)} held-out normal pictures: it will flag from "
            f"{low:.2g} to {high:.2g} % of normal pictures (95 % interval)."
        ]
        if "unlabelled" in threshold:
            text.append(f"It flags {threshold['flagged']} of the {threshold['unlabelled']} unlabelled pictures.")
    if share := results.get("explained"):
        text.append(
            f"On held-out pictures its error is {100 * share['value']:.1f} % smaller than that of a predictor that "
            f"ignores the picture ({100 * share['low']:.1f} to {100 * share['high']:.1f} %); near 0 nothing has been "
            "learnt."
        )
    rows = [[f"{100 * level:g} %", f"{np.quantile(held_out_N, level):.6g}"] for level in LEVELS if len(held_out_N)]
    return [Section("Held-out scores", text, ["of the held-out pictures at most", "score"], rows)]


def strips_of(by_name: Mapping[str, Scored]) -> list[Section]:
    titles = {
        UNLABELLED: "The most novel unlabelled pictures",
        "held_out": "The most unusual held-out pictures",
        "train": "The most unusual training pictures: mistakes in the data are often among them",
    }
    sections = []
    for name, title in titles.items():
        if part := by_name.get(name):
            highest = np.argsort(-part.score_N, kind="stable")[:SHOWN].tolist()
            kind = "novel" if name == UNLABELLED else "known"
            cards = [card(part.shard_set, int(part.sample_N[i]), kind, float(part.score_N[i])) for i in highest]
            sections.append(Section(title, groups=[Group("", [Strip("", cards)])]))
    return sections


def settings_of(settings: Mapping[str, Any]) -> Section:
    return Section("Settings", headings=["setting", "value"], rows=flattened(settings))
