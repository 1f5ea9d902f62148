"""Many detectors on the same features: fitted and scored, shared among the processes, judged in one table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.protocol import Split, labels_of, only_label
from bigtrain.detectors.calibration import Calibration
from bigtrain.detectors.catalogue import EVERY_ROW, ON_LOGITS, name_of
from bigtrain.detectors.classical.logits import MaxLogit
from bigtrain.detectors.feature_detector import FeatureDetector, checked
from bigtrain.detectors.image_detector import calibrated
from bigtrain.detectors.network_detector import NetworkDetector
from bigtrain.evaluation.judge import class_figures, shown, threshold_rates
from bigtrain.evaluation.metrics import summary
from bigtrain.evaluation.normal_only import strips_of, threshold_of
from bigtrain.evaluation.report.overlays import most_telling
from bigtrain.evaluation.report.page import Section, write_page
from bigtrain.evaluation.report.report import write_report
from bigtrain.evaluation.report.sections import by_class
from bigtrain.evaluation.scored import UNLABELLED, Scored, judged_images, write_scores
from bigtrain.progress import Progress
from bigtrain.training.feature_cache import Source, extracted
from bigtrain.training.run_setup import Setup

SCORED_AT_ONCE = 256
MAX_SAVED_BYTES = 1 << 30  # of what a detector has learned, where all are saved
FIRST = "nearest neighbours"  # the row that the report begins with, where it is there: no method is plainer


class Inputs(NamedTuple):
    """What detectors are fitted to and score: features, or the logits of a head."""

    source: NetworkDetector
    fitted_ND: NDArray[np.float32]
    class_N: NDArray[np.int64]
    held_out_ND: NDArray[np.float32]
    test_ND: NDArray[np.float32]
    unlabelled_ND: NDArray[np.float32]


class Row(NamedTuple):
    detector: FeatureDetector
    inputs: Inputs


class Scores(NamedTuple):
    held_out_N: NDArray[np.float64]
    test_N: NDArray[np.float64]
    unlabelled_N: NDArray[np.float64]


class Seen(NamedTuple):
    """What was read of the images that could be decoded; those that could not, by split."""

    inputs: dict[str, Inputs]  # "features", and "logits" where the network has a head of the known classes
    held_out_N: NDArray[np.int64]
    test_N: NDArray[np.int64]
    unlabelled_N: NDArray[np.int64]
    skipped: dict[str, dict[str, str]]


def read_inputs(folder: Path, setup: Setup, source: NetworkDetector, split: Split) -> Seen:
    """The features of all images of the run, and of a network with a head of the known classes the logits."""
    known_N = np.sort(np.concatenate([split.fitted_N, split.held_out_N]))
    head = source.network.head_of(split.protocol.known)
    kinds = {"features": source}
    if head:
        end = replace(source.scoring, layer="", head=head)
        kinds["logits"] = NetworkDetector(source.network, MaxLogit(), end)
    inputs: dict[str, Inputs] = {}
    for kind, its in kinds.items():
        layer = Source.layer(its)
        train = extracted(folder, setup, layer, split.train, known_N)
        to_score_N = np.sort(np.concatenate([split.test_N, split.unlabelled_N]))
        test = extracted(folder, setup, layer, split.test, to_score_N) if len(to_score_N) else train
        (fitted_N, fitted_ND), (held_out_N, held_out_ND) = train.of(split.fitted_N), train.of(split.held_out_N)
        (test_N, test_ND), (unlabelled_N, unlabelled_ND) = test.of(split.test_N), test.of(split.unlabelled_N)
        if kind == "logits":
            every = (fitted_ND, held_out_ND, test_ND, unlabelled_ND)
            fitted_ND, held_out_ND, test_ND, unlabelled_ND = (its.logits_of(x) for x in every)
        label_of = labels_of(source.network.classes[head] if head else split.protocol.known)
        class_N = np.array([only_label(split.train, sample, label_of) for sample in fitted_N.tolist()])
        inputs[kind] = Inputs(its, fitted_ND, class_N, held_out_ND, test_ND, unlabelled_ND)
    return Seen(
        inputs,
        held_out_N,
        test_N,
        unlabelled_N,
        {"train": train.skipped, "test": test.skipped if test is not train else {}},
    )


def score_rows(
    setup: Setup, rows: Mapping[str, Row], *, quantile: float, save: Sequence[str]
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Fit each row, and score the held-out, the test and the unlabelled images; the processes share the rows.

    Args:
        quantile: of the held-out images' scores, for the threshold of a saved detector.
        save: rows whose detector is written to RUN/detectors; EVERY_ROW for all.

    Returns:
        The scores of the rows that could be fitted, and why the others could not.
    """
    from accelerate.utils import gather_object

    accelerator, own, failed = setup.accelerator, list[tuple[str, Scores]](), list[tuple[str, str]]()
    saved_networks: dict[int, Path] = {}
    for number, (name, row) in enumerate(rows.items()):
        setup.heartbeat.mark(f"began to fit {name}")
        if number % accelerator.num_processes == accelerator.process_index:
            try:
                own.append((name, fitted_and_scored(name, row, has_bar=accelerator.num_processes == 1)))
            except Exception as error:  # a library's too: the other rows, and the other processes, go on
                failed.append(
                    (name, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
                )
                print(f"{name} is left out: {failed[-1][1]}", flush=True)
            else:
                keep(setup, name, row, own[-1][1], quantile, save, saved_networks)
        setup.stop.leave_if_asked()
    everyone, not_fitted = dict(gather_object(own)), dict(gather_object(failed))
    if not everyone:
        raise ValueError(f"no detector could be fitted: {'; '.join(f'{n}: {why}' for n, why in not_fitted.items())}")
    return {name: everyone[name] for name in rows if name in everyone}, not_fitted


def fitted_and_scored(name: str, row: Row, *, has_bar: bool) -> Scores:
    detector, inputs = row
    began = time.monotonic()
    detector.fit(inputs.fitted_ND, inputs.class_N)
    fitted_s, began = time.monotonic() - began, time.monotonic()
    judged = (inputs.held_out_ND, inputs.test_ND, inputs.unlabelled_ND)
    scores = Scores(*(score(name, detector, features_ND, has_bar=has_bar) for features_ND in judged))
    print(f"{name}: fitted in {fitted_s:.1f} s, scored in {time.monotonic() - began:.1f} s", flush=True)
    return scores


def keep(
    setup: Setup, name: str, row: Row, scores: Scores, quantile: float, save: Sequence[str], networks: dict[int, Path]
) -> None:
    """Save a row's detector, where it was asked for; its network shares the file of an earlier one's."""
    detector, inputs = row
    learned = sum(value.nbytes for value in vars(detector).values() if isinstance(value, np.ndarray))
    if name not in save and (EVERY_ROW not in save or learned > MAX_SAVED_BYTES):
        if EVERY_ROW in save:
            print(f"{name} is not saved, for it holds {learned / 1e9:.1f} GB: --save '{name}' does it", flush=True)
        return
    saved = NetworkDetector(inputs.source.network, detector, inputs.source.scoring)
    saved.calibrate(scores.held_out_N, quantile)
    folder = setup.run / "detectors" / folder_of(name)
    saved.save(folder, network_in=networks.get(id(inputs.source.network)))
    networks.setdefault(id(inputs.source.network), folder)


def folder_of(row: str) -> str:
    """The name of a row's folder in RUN/detectors."""
    return row.replace(" ", "_")


def score(
    name: str, detector: FeatureDetector, features_ND: NDArray[np.float32], *, has_bar: bool = True
) -> NDArray[np.float64]:
    """The novelty of these images, with their progress: local KNFST solves an eigenproblem for each."""
    checked(features_ND)  # as a whole: in chunks it would count only one chunk's
    scores = [np.zeros(0)]
    with Progress(len(features_ND), name, has_bar=has_bar) as progress:
        for first in range(0, len(features_ND), SCORED_AT_ONCE):
            scores.append(detector.score(features_ND[first : first + SCORED_AT_ONCE]))
            progress.add(len(scores[-1]))
    return np.concatenate(scores)


@dataclass(frozen=True)
class Table:
    """The figures of all rows on the same test images."""

    split: Split
    seen: Seen
    rows: Mapping[str, Row]
    scores: Mapping[str, Scores]  # Of the rows that could be fitted.
    not_fitted: Mapping[str, str]  # Row -> why it could not.
    quantile: float  # Of the held-out known images' scores, for each row's threshold.
    seed: int

    @cached_property
    def novel_N(self) -> NDArray[np.bool_]:
        return ~self.split.protocol.is_known(self.split.test)[self.seen.test_N]

    @cached_property
    def figures(self) -> dict[str, dict[str, Any]]:
        return {name: self._figures(name) for name in self.scores}

    def _figures(self, name: str) -> dict[str, Any]:
        (detector, inputs), scores = self.rows[name], self.scores[name]
        if not len(scores.test_N):
            unlabelled = self.scored(name)[-1] if len(scores.unlabelled_N) else None
            threshold = calibrated(scores.held_out_N, self.quantile)
            return {"threshold": threshold_of(threshold, scores.held_out_N, unlabelled)}
        found = summary(self.novel_N, scores.test_N, seed=self.seed)
        threshold = calibrated(scores.held_out_N, self.quantile)
        found["threshold"] = threshold_rates(threshold, self.scored(name)[0])
        if name_of(detector) in ON_LOGITS:
            classes = inputs.source.network.classes[inputs.source.scoring.head]
            answers = [classes[number] for number in inputs.test_ND.argmax(axis=1)]
            found |= {name: its._asdict() for name, its in class_figures(self.scored(name)[0], answers).items()}
        return found

    def scored(self, name: str) -> list[Scored]:
        """A row's scores of the test, the held-out and the unlabelled images."""
        seen, scores = self.seen, self.scores[name]
        none_N = np.zeros(len(seen.held_out_N), bool)
        return [
            Scored(self.split.test, "test", seen.test_N, self.novel_N, scores.test_N, name),
            Scored(self.split.train, "held_out", seen.held_out_N, none_N, scores.held_out_N, name),
            Scored(self.split.test, UNLABELLED, seen.unlabelled_N, seen.unlabelled_N < 0, scores.unlabelled_N, name),
        ]

    def results(self, method: str) -> dict[str, Any]:
        """The record of results.json."""
        images = judged_images(self.split, self.seed, len(self.seen.held_out_N), self.seen.skipped)
        return {"method": method, "detectors": self.figures, "not_fitted": dict(self.not_fitted), **images}

    def write_scores(self, path: Path) -> None:
        write_scores(path, [part for name in self.scores for part in self.scored(name)])

    def write_report(self, path: Path, title: str, settings: Mapping[str, Any]) -> None:
        """One page for all rows; of normal pictures alone the thresholds, and the most unusual ones."""
        first = next((name for name in self.scores if name.startswith(FIRST)), next(iter(self.scores)))
        if not len(self.seen.test_N):
            self._write_normal_report(path, title, first)
            return
        threshold = calibrated(self.scores[first].held_out_N, self.quantile)
        protocol, test = self.split.protocol, self.scored(first)[0]
        classes_N = [test.shard_set.classes_of(int(sample)) for sample in test.sample_N]
        telling = most_telling(test.novel_N, test.score_N)
        telling |= {f"Of class {name}": places for name, places in by_class(classes_N, test.score_N).items()}
        write_report(
            path,
            title=title,
            results={
                "metrics": self.figures[first],
                "detector": first,
                "dataset": self.split.test.manifest.dataset,
                "known": protocol.known,
                "novel": protocol.novel,
                "seed": self.seed,
                "threshold": threshold,
                "threshold_quantile": self.quantile,
                "settings": settings,
            },
            novel_N=self.novel_N,
            score_N=test.score_N,
            comparisons={n: (self.scores[n].test_N, its) for n, its in self.figures.items() if n != first},
            pictures={what: shown(test, places) for what, places in telling.items()},
            calibration=Calibration.of(self.scores[first].held_out_N, ""),
            classes_N=classes_N,
        )

    def _write_normal_report(self, path: Path, title: str, first: str) -> None:
        held_out, unlabelled = len(self.seen.held_out_N), len(self.seen.unlabelled_N)
        thresholds = {name: figures["threshold"] for name, figures in self.figures.items() if figures["threshold"]}
        lead = [f"{self.split}. There are no novel pictures, so no figure says how well novelty is found."]
        if threshold := thresholds.get(first):
            low, high = (100 * threshold["false_alarms"][end] for end in ("low", "high"))
            lead.append(
                f"Thresholds lie at the {100 * self.quantile:g}th percentile of the scores of {held_out} held-out "
                f"pictures, and will flag from {low:.2g} to {high:.2g} % of normal pictures (95 % interval)."
            )
        rows = [
            [name, f"{its['value']:.6g}", *([f"{its['flagged']} of {unlabelled}"] if unlabelled else [])]
            for name, its in thresholds.items()
        ]
        headings = ["detector", "threshold", *(["unlabelled flagged"] if unlabelled else [])]
        by_name = {part.split: part for part in self.scored(first)[1:] if len(part.score_N)}
        pictures = [section._replace(text=[f"By {first}."]) for section in strips_of(by_name)]
        write_page(path, title, lead, [Section("Thresholds", headings=headings, rows=rows), *pictures])

    def lines(self) -> str:
        wide = max(map(len, self.figures))
        if not len(self.seen.test_N):
            values = {name: (its["threshold"] or {}).get("value", float("nan")) for name, its in self.figures.items()}
            return "\n".join(f"{name:{wide}}  threshold {value:.6g}" for name, value in values.items())
        aurocs = {name: figures["auroc"] for name, figures in self.figures.items()}
        return "\n".join(f"{name:{wide}}  AUROC {its['value']:.3f} {interval(its)}" for name, its in aurocs.items())


def interval(figure: Mapping[str, float]) -> str:
    return f"({figure['low']:.3f} .. {figure['high']:.3f})"
