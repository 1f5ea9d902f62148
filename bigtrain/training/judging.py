"""The last step of a run that trains a detector: judged on the test split, with its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bigtrain.data.protocol import Split, seeded_choice
from bigtrain.evaluation.judge import Features, judge
from bigtrain.evaluation.normal_only import judge_normal
from bigtrain.runtime.settings import result_settings
from bigtrain.training.run import Result
from bigtrain.training.run_setup import Setup

if TYPE_CHECKING:
    from bigtrain.detectors.image_detector import ImageDetector


def judged(
    config: Any,
    setup: Setup,
    split: Split,
    detector: ImageDetector,
    *,
    method: str,
    plain: Mapping[str, Features],
    floors: Mapping[str, ImageDetector] | None = None,
    classes: Sequence[str] = (),
) -> Result:
    """Save the detector, and judge it beside plain figures.

    Args:
        config: a recipe's, with JudgeMixin and RunMixin.
        plain, floors, classes: see `judge`.
    """
    read = partial(setup.in_order, transform=detector.view(), batch=config.score_batch)
    quantile = config.threshold_percentile / 100
    bank_N = seeded_choice(split.fitted_N, config.neighbours_bank, config.seed)
    if not len(split.test_N):
        results = judge_normal(
            setup.run.path, setup.accelerator, detector, split, read,
            method=method, floors=floors, bank_N=bank_N,
            settings=result_settings(config), seed=config.seed, quantile=quantile,
        )  # fmt: skip
        return Result(results, normal_summary_of(results))
    results = judge(
        setup.run.path, setup.accelerator, detector, split, read,
        method=method, plain=plain, floors=floors, classes=classes, bank_N=bank_N,
        settings=result_settings(config), seed=config.seed, quantile=quantile,
    )  # fmt: skip
    return Result(results, summary_of(results))


def summary_of(results: Mapping[str, Any]) -> str:
    """AUROC with its interval, closed-set accuracy where there is one, and the plain figures' AUROC."""
    auroc, accuracy = results["auroc"], results.get("closed_set_accuracy")
    parts = [f"AUROC {auroc['value']:.3f} (95 % interval {auroc['low']:.3f} to {auroc['high']:.3f})"]
    if auroc["high"] < 0.5:
        parts[0] += ", which is worse than guessing"
    if accuracy:
        parts[0] += f", closed-set accuracy {accuracy['value']:.3f}"
    parts += [f"{name} {figures['auroc']['value']:.3f}" for name, figures in results["comparisons"].items()]
    return parts[0] + "; " + ", ".join(parts[1:])


def normal_summary_of(results: Mapping[str, Any]) -> str:
    """The threshold and what it flags, of a run on normal pictures alone."""
    if (threshold := results["threshold"]) is None:
        return "the detector has no threshold, for no picture was held out"
    low, high = (100 * threshold["false_alarms"][end] for end in ("low", "high"))
    said = f"threshold {threshold['value']:.6g}: {low:.2g} to {high:.2g} % of normal pictures will be flagged"
    return said + (
        f"; {threshold['flagged']} of {threshold['unlabelled']} unlabelled ones are"
        if "unlabelled" in threshold
        else ""
    )
