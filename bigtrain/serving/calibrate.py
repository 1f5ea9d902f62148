"""`bigtrain calibrate`: the threshold of a detector from other normal pictures, such as a new camera's; no training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.detectors import HUB_PREFIX, detector_folder
from bigtrain.detectors.calibration import SOON, Calibration, Threshold
from bigtrain.detectors.image_detector import calibrated
from bigtrain.detectors.record import DETECTOR_FILE, VERSION, read_record
from bigtrain.evaluation.report.model_card import write_threshold
from bigtrain.files import whole_folder, write_json
from bigtrain.progress import Progress
from bigtrain.runtime.exit_codes import UNREADABLE
from bigtrain.serving.any_detector import EXPORTED, any_detector
from bigtrain.serving.read_ahead import batches_ahead
from bigtrain.serving.sources import Reader, chunks, pictures_of
from bigtrain.text import clean, counted

SURPRISING = 0.01  # a p-value of the test below which two samples of scores are said to differ


@dataclass(frozen=True)
class Options:
    """Of the command; see its help."""

    detector: str
    normal: str
    percentile: float
    out: Path | None
    device: str | None
    allow_private: bool


def calibrate(options: Options) -> int:
    """Score normal pictures, keep the scores in detector.json, and say what they promise; returns the exit code.

    Raises:
        ValueError: a mistake in the command; nothing has been written.
    """
    folder = checked_folder(options)
    detector = any_detector(str(folder), options.device)
    reader = Reader(options.normal, may_be_private=options.allow_private)
    names = pictures_of(options.normal, may_be_private=options.allow_private)
    parts, why_not = [np.zeros(0)], list[str]()
    with Progress(0) as progress:
        for ready in batches_ahead(
            chunks(names, detector.scoring.batch), reader, detector.view(), detector.scoring.batch
        ):
            if ready.image_B3HW is not None:
                parts.append(detector.score_views(ready.image_B3HW).score_B[: int(ready.is_read_b.sum())])
            why_not += [f"{n.name}: {why}" for n, why in zip(ready.named, ready.why_not, strict=True) if why]
            progress.add(len(ready.named))
    score_N = np.concatenate(parts)
    if not len(score_N):
        raise ValueError(f"--normal {options.normal}: none of its pictures could be read ({clean(why_not[0])}).")
    calibration = Calibration.of(score_N, options.normal)
    value = calibrated(score_N, options.percentile / 100)
    assert value is not None
    difference = compared(detector.calibration, calibration)
    write(folder, options, calibration, value, difference)
    print(said(options, calibration, calibration.threshold(value), detector.threshold(), difference), flush=True)
    for line in why_not[:5]:
        print(f"cannot be read: {clean(line)}", flush=True)
    return UNREADABLE if why_not else 0


def checked_folder(options: Options) -> Path:
    if not 0.01 <= options.percentile <= 99.99:
        raise ValueError(f"--percentile {options.percentile:g} must be from 0.01 to 99.99.")
    if Path(options.detector).suffix in EXPORTED:
        raise ValueError(
            f"--detector {options.detector} is an exported model, which keeps its calibration: calibrate the detector "
            "that it was made from, and export again."
        )
    if options.out is None and options.detector.startswith(HUB_PREFIX):
        raise ValueError(f"--detector {options.detector} is a copy of the hub's, and is not changed: give --out DIR.")
    if options.out is not None and options.out.exists():
        raise ValueError(f"--out {options.out} exists: name a new folder.")
    return detector_folder(options.detector)


def compared(before: Calibration, after: Calibration) -> dict[str, Any] | None:
    """Whether two samples of scores may come of the same pictures: the two-sample test of Kolmogorov and Smirnov, and
    the share of pairs in which the new score is the higher (1/2 where nothing has moved). None without old scores."""
    if not len(before):
        return None
    from scipy.stats import ks_2samp, mannwhitneyu

    test = ks_2samp(before.score_N, after.score_N)
    higher = mannwhitneyu(after.score_N, before.score_N).statistic / (len(before) * len(after))
    return {
        "test": "Kolmogorov-Smirnov, two samples",
        "p_value": float(test.pvalue),
        "largest_difference": float(test.statistic),
        "new_is_higher": float(higher),
        "before": {"pictures": before.pictures, "count": len(before), "median": float(np.median(before.score_N))},
    }


def write(
    folder: Path, options: Options, calibration: Calibration, value: float, difference: dict[str, Any] | None
) -> None:
    """Into detector.json, or into a copy of the folder."""
    record = read_record(folder) | {
        "version": VERSION,
        "threshold": value,
        "threshold_quantile": options.percentile / 100,
        "calibration": {**calibration.record(), "compared": difference},
    }
    if options.out is None:
        write_json(folder / DETECTOR_FILE, record)
        write_threshold(folder, record)
        return
    with whole_folder(options.out) as copy:
        for file in folder.iterdir():
            if file.is_file() and file.name != DETECTOR_FILE:
                shutil.copyfile(file, copy / file.name)
        write_json(copy / DETECTOR_FILE, record)
        write_threshold(copy, record)


def said(
    options: Options,
    calibration: Calibration,
    now: Threshold,
    before: Threshold | None,
    difference: dict[str, Any] | None,
) -> str:
    assert now.low is not None and now.high is not None
    was = "" if before is None else f" (it was {before.value:.6g})"
    lines = [
        f"threshold {now.value:.6g}{was}, from {counted(len(calibration), 'normal picture')}: it will flag "
        f"{100 * now.low:.2g} to {100 * now.high:.2g} % of normal pictures (95 % interval)"
    ]
    if 1 / (len(calibration) + 1) > 1 - options.percentile / 100 + SOON:
        needed = int(np.ceil(1 / (1 - options.percentile / 100) - 1e-6)) - 1
        lines.append(
            f"of {len(calibration)} pictures a rate of {100 - options.percentile:g} % cannot be promised: at least "
            f"{needed} are needed"
        )
    if difference is not None:
        lines.append(sentence(difference))
    lines.append(f"kept in {options.out or detector_folder(options.detector)}/{DETECTOR_FILE}")
    return "\n".join(lines)


def sentence(difference: dict[str, Any]) -> str:
    before, p_value = difference["before"], difference["p_value"]
    moved = f"a new score is the higher one in {100 * difference['new_is_higher']:.0f} % of pairs"
    of = f"the {before['count']} scores before ({before['pictures']})"
    if p_value < SURPRISING:
        return (
            f"these pictures do not look like {of}: {moved}; Kolmogorov-Smirnov p {p_value:.2g}. Look at the most "
            "novel of them before you trust the threshold: `bigtrain score --page`"
        )
    return f"no difference to {of} is seen: {moved}; Kolmogorov-Smirnov p {p_value:.2g}"
