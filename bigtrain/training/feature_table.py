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
from bigtrain.detectors.catalogue import ON_LOGITS, name_of
from bigtrain.detectors.classical.logits import MaxLogit
from bigtrain.detectors.feature_detector import FeatureDetector, checked
from bigtrain.detectors.image_detector import calibrated
from bigtrain.detectors.network_detector import NetworkDetector
from bigtrain.evaluation.judge import Scored, class_figures, judged_images, threshold_rates, write_scores
from bigtrain.evaluation.metrics import IN_REPORT, summary
from bigtrain.evaluation.report.page import Section, write_page
from bigtrain.progress import Progress
from bigtrain.training.feature_cache import Source, extracted
from bigtrain.training.run_setup import Setup

SCORED_AT_ONCE = 256


class Inputs(NamedTuple):
    """What detectors are fitted to and score: features, or the logits of a head."""

    source: NetworkDetector
    fitted_ND: NDArray[np.float32]
    class_N: NDArray[np.int64]
    held_out_ND: NDArray[np.float32]
    test_ND: NDArray[np.float32]


class Row(NamedTuple):
    detector: FeatureDetector
    inputs: Inputs


class Scores(NamedTuple):
    held_out_N: NDArray[np.float64]
    test_N: NDArray[np.float64]


class Seen(NamedTuple):
    """What was read of the images that could be decoded; those that could not, by split."""

    inputs: dict[str, Inputs]  # "features", and "logits" where the network has a head of the known classes
    held_out_N: NDArray[np.int64]
    test_N: NDArray[np.int64]
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
        test = extracted(folder, setup, layer, split.test, split.test_N)
        (fitted_N, fitted_ND), (held_out_N, held_out_ND) = train.of(split.fitted_N), train.of(split.held_out_N)
        test_N, test_ND = test.of(split.test_N)
        if kind == "logits":
            fitted_ND, held_out_ND, test_ND = (its.logits_of(x) for x in (fitted_ND, held_out_ND, test_ND))
        label_of = labels_of(source.network.classes[head] if head else split.protocol.known)
        class_N = np.array([only_label(split.train, sample, label_of) for sample in fitted_N.tolist()])
        inputs[kind] = Inputs(its, fitted_ND, class_N, held_out_ND, test_ND)
    return Seen(inputs, held_out_N, test_N, {"train": train.skipped, "test": test.skipped})


def score_rows(setup: Setup, rows: Mapping[str, Row], *, quantile: float, save: Sequence[str]) -> dict[str, Scores]:
    """Fit each row, and score the held-out and the test images; the rows are shared among the processes.

    Args:
        quantile: of the held-out images' scores, for the threshold of a saved detector.
        save: rows whose detector is written to RUN/detectors.
    """
    from accelerate.utils import gather_object

    accelerator, own = setup.accelerator, []
    for number, (name, (detector, inputs)) in enumerate(rows.items()):
        setup.heartbeat.mark(f"began to fit {name}")
        if number % accelerator.num_processes == accelerator.process_index:
            began = time.monotonic()
            detector.fit(inputs.fitted_ND, inputs.class_N)
            fitted_s, began = time.monotonic() - began, time.monotonic()
            is_alone = accelerator.num_processes == 1
            judged = (inputs.held_out_ND, inputs.test_ND)
            scores = Scores(*(score(name, detector, features_ND, has_bar=is_alone) for features_ND in judged))
            print(f"{name}: fitted in {fitted_s:.1f} s, scored in {time.monotonic() - began:.1f} s", flush=True)
            own.append((name, scores))
            if name in save:
                saved = NetworkDetector(inputs.source.network, detector, inputs.source.scoring)
                saved.calibrate(scores.held_out_N, quantile)
                saved.save(setup.run / "detectors" / name.replace(" ", "_"))
        setup.stop.leave_if_asked()
    everyone = dict(gather_object(own))
    return {name: everyone[name] for name in rows}


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
    scores: Mapping[str, Scores]
    quantile: float  # Of the held-out known images' scores, for each row's threshold.
    seed: int

    @cached_property
    def novel_N(self) -> NDArray[np.bool_]:
        return ~self.split.protocol.is_known(self.split.test)[self.seen.test_N]

    @cached_property
    def figures(self) -> dict[str, dict[str, Any]]:
        return {name: self._figures(name) for name in self.rows}

    def _figures(self, name: str) -> dict[str, Any]:
        (detector, inputs), scores = self.rows[name], self.scores[name]
        found = summary(self.novel_N, scores.test_N, seed=self.seed)
        threshold = calibrated(scores.held_out_N, self.quantile)
        found["threshold"] = threshold_rates(threshold, self._scored(name)[0])
        if name_of(detector) in ON_LOGITS:
            classes = inputs.source.network.classes[inputs.source.scoring.head]
            answers = [classes[number] for number in inputs.test_ND.argmax(axis=1)]
            found |= {name: its._asdict() for name, its in class_figures(self._scored(name)[0], answers).items()}
        return found

    def _scored(self, name: str) -> list[Scored]:
        seen, scores = self.seen, self.scores[name]
        none_N = np.zeros(len(seen.held_out_N), bool)
        return [
            Scored(self.split.test, "test", seen.test_N, self.novel_N, scores.test_N, name),
            Scored(self.split.train, "held_out", seen.held_out_N, none_N, scores.held_out_N, name),
        ]

    def results(self, method: str) -> dict[str, Any]:
        """The record of results.json."""
        images = judged_images(self.split, self.seed, len(self.seen.held_out_N), self.seen.skipped)
        return {"method": method, "detectors": self.figures, **images}

    def write_scores(self, path: Path) -> None:
        write_scores(path, [part for name in self.rows for part in self._scored(name)])

    def write_page(self, path: Path, title: str, about: str) -> None:
        """One page with all rows."""
        headings = ["detector", *(figure.heading for figure in IN_REPORT.values()), "known flagged", "novel missed"]
        rows = []
        for name, figures in self.figures.items():
            cells = [f"{figures[figure]['value']:.3f} {interval(figures[figure])}" for figure in IN_REPORT]
            threshold = figures["threshold"] or {}
            shares = [f"{threshold[s]:.3f}" if threshold else "" for s in ("known_flagged", "novel_missed")]
            rows.append([name, *cells, *shares])
        protocol = self.split.protocol
        lead = [
            f"{self.split.test.manifest.dataset}: {len(protocol.known)} known classes ({', '.join(protocol.known)}), "
            f"{len(protocol.novel)} novel ones. {about}",
            "Values with 95 % intervals over images. Known flagged and novel missed are the shares of errors at the "
            f"threshold, the {100 * self.quantile:g}th percentile of held-out known images' scores.",
        ]
        write_page(path, title, lead, [Section("Figures", headings=headings, rows=rows)])

    def lines(self) -> str:
        wide = max(map(len, self.figures))
        aurocs = {name: figures["auroc"] for name, figures in self.figures.items()}
        return "\n".join(f"{name:{wide}}  AUROC {its['value']:.3f} {interval(its)}" for name, its in aurocs.items())


def interval(figure: Mapping[str, float]) -> str:
    return f"({figure['low']:.3f} .. {figure['high']:.3f})"
