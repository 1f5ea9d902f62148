"""The classical detectors that Perera & Patel (CVPR 2019, 5.1) compare with, on features of any layer of any network.

    accelerate launch recipes/deep_novelty.py --train data/birds --protocol first-half --branches one \
        --membership-weight 0 --out runs/finetuned
    accelerate launch recipes/baselines.py --train data/birds --protocol first-half --finetuned \
        runs/finetuned/network.safetensors --out runs/birds-baselines

Features are extracted once, and kept. Rows with "pre" are of --network as it is given; those without of --finetuned,
the network of the first command, row (a) of 5.4, whose logits serve the methods on logits.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.workers import prepare_workers
from bigtrain.detectors.catalogue import EVERY, ON_FEATURES, ON_LOGITS, detector_class, name_of
from bigtrain.models.timm_names import check_source
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.launch import check_launch
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import Limits, check_ranges, print_if_asked, read_settings
from bigtrain.text import clock
from recipes.network_settings import (
    NETWORK_LIMITS,
    Data,
    NetworkConfig,
    check_names,
    check_settings,
    check_single_labels,
    labels_of,
    only_label,
    read_data,
)

if TYPE_CHECKING:  # what needs torch is imported where it is used, behind all mistakes that can be told without
    from bigtrain.detectors.contract import FeatureDetector
    from bigtrain.detectors.network import NetworkDetector
    from bigtrain.evaluation.judge import Scored
    from bigtrain.models.backbone import Network
    from recipes.run_setup import Setup

SCORED_AT_ONCE = 256
FIGURES = ("auroc", "aupr_out", "fpr_at_95_tpr_known")  # of the page and of what is printed


@dataclass(frozen=True)
class Config(NetworkConfig):
    finetuned: str = ""
    """A network trained on the same known classes: network.safetensors of a run of recipes/deep_novelty.py with
    --branches one --membership-weight 0. Give both the same data and --seed, --protocol, --order, --train-limit and
    --validation-share, or images are held out here that it was trained on."""
    layer: str = ""
    """The layer whose features are taken, by torch's name; empty: what the classifier would see."""
    detectors: tuple[str, ...] = ()
    """Which of them, by name; empty: all that these classes and networks allow."""
    nu: float = 0.1
    """Of the one-class SVM and SVDD: largest share of known images outside."""
    local_neighbours: int = 600
    """k of local KNFST."""
    landmarks: int = 0
    """Of KNFST: 0 is exact, up to 20 000 images; else Nystroem's kernel of so many of them."""
    share: float = 0.1
    """Of K-extremes: share of the dimensions that make a signature."""
    save: tuple[str, ...] = ()
    """Rows whose detector is saved, in OUT/detectors/ROW, each with its network."""
    features: str = ""
    """Folder that keeps features, for several runs; empty: the run's own."""


LIMITS: Limits = {
    **NETWORK_LIMITS,
    "nu": (1e-6, 1),
    "share": (1e-6, 1 - 1e-6),
    "local_neighbours": (1, math.inf),
    "landmarks": (0, math.inf),
}


class Inputs(NamedTuple):
    """What detectors are fitted to and score: features, or the logits of a head."""

    source: NetworkDetector
    fitted_ND: NDArray[np.float32]
    class_N: NDArray[np.int64]
    held_out_ND: NDArray[np.float32]
    test_ND: NDArray[np.float32]


class Scores(NamedTuple):
    held_out_N: NDArray[np.float64]
    test_N: NDArray[np.float64]


def main(argv: list[str] | None = None) -> None:
    with user_errors("baselines.py"):
        argv = sys.argv[1:] if argv is None else argv
        config = read_settings(Config, argv, description=__doc__)
        check_ranges(config, LIMITS)
        print_if_asked(config, argv)
        check_settings(config)
        if unknown := [name for name in config.detectors if name not in EVERY]:
            raise ValueError(f"there is no detector {', '.join(unknown)}; there are {', '.join(EVERY)}.")
        check_launch()
        run = RunFolder(config.run.out, config)
        if run.is_already_finished():
            return
        data = read_data(config)
        check_single_labels(data.train, data.parts.fitted_N, data.protocol.known)
        check_names(config)
        if config.finetuned:
            check_source(config.finetuned)
        baselines(config, run, data)


def baselines(config: Config, run: RunFolder, data: Data) -> None:
    began = time.monotonic()
    prepare_workers(config.run.workers)
    from bigtrain.data.pictures import jpeg_decoder
    from bigtrain.detectors.logits import MaxLogit
    from bigtrain.detectors.network import NetworkDetector, Scoring
    from bigtrain.runtime.precision import choose_precision
    from recipes.run_setup import Setup

    parts = data.parts
    networks = given_networks(config, data.protocol.known)
    precision = run.resolved("precision") or choose_precision(config.precision)
    scoring = Scoring(
        image_size=config.image_size, resize=config.resize, precision=precision, batch=config.score_batch,
        layer=config.layer, head="",
    )  # fmt: skip
    sources = {suffix: NetworkDetector(network, MaxLogit(), scoring) for suffix, network in networks.items()}
    setup = Setup.begin(run, precision, {})
    accelerator = setup.accelerator
    described = "; ".join(f"{n.architecture.model}{suffix}, {n.report}" for suffix, n in networks.items())
    accelerator.print(
        f"baselines: {data.train.manifest.dataset}, {len(parts.fitted_N)} images of {len(data.protocol.known)} known "
        f"classes to fit and {len(parts.test_N)} to judge; {described}; {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, precision {precision}, JPEGs by {jpeg_decoder()}"
    )
    rows: dict[str, tuple[FeatureDetector, Inputs]] = {}
    for suffix, network in networks.items():
        network.to(accelerator.device)
        seen = read_inputs(config, setup, sources[suffix], data)
        rows |= rows_of(config, seen.inputs, suffix, data, accelerator.print)

    from bigtrain.detectors.saved import calibrated
    from bigtrain.evaluation.judge import Scored, rates, write_scores
    from bigtrain.evaluation.metrics import closed_set_accuracy, oscr, summary

    scores = scores_of(config, run, setup, rows)
    test = Scored(data.test, "test", seen.test_N, ~data.protocol.is_known(data.test)[seen.test_N], np.zeros(0))
    held_out = Scored(data.train, "held_out", seen.held_out_N, np.zeros(len(seen.held_out_N), bool), np.zeros(0))
    table: dict[str, dict[str, Any]] = {}
    scored: list[Scored] = []
    for name, (detector, inputs) in rows.items():
        own = [
            replace(part, score_N=score_N, detector=name)
            for part, score_N in ((test, scores[name].test_N), (held_out, scores[name].held_out_N))
        ]
        scored += own
        threshold = calibrated(scores[name].held_out_N, config.threshold_percentile / 100)
        table[name] = summary(test.novel_N, scores[name].test_N, seed=config.seed)
        table[name]["threshold"] = rates(threshold, own[0])
        if name_of(detector) in ON_LOGITS:
            is_right_N = right_answers(data, inputs, test)
            table[name]["closed_set_accuracy"] = closed_set_accuracy(is_right_N[~test.novel_N])._asdict()
            table[name]["oscr"] = oscr(test.novel_N, scores[name].test_N, is_right_N)._asdict()
    if accelerator.is_main_process:
        write_scores(run / "scores.parquet", scored)
        write_table(run / "report.html", config, data, table)
        results = {
            "method": "baselines",
            "detectors": table,
            "dataset": data.test.manifest.dataset,
            "known": list(data.protocol.known),
            "novel": list(data.protocol.novel),
            "seed": config.seed,
            "held_out_known": len(held_out.sample_N),
            "skipped": seen.skipped,
        }
        run.finish(results)
    setup.end_trackers()
    for name, figures in table.items():
        auroc = figures["auroc"]
        accelerator.print(f"{name:{max(map(len, table))}}  AUROC {auroc['value']:.3f} {interval(auroc)}")
    accelerator.print(f"this start took {clock(time.monotonic() - began)}; report: {run / 'report.html'}")


def given_networks(config: Config, known: Sequence[str]) -> dict[str, Network]:
    """The networks whose features are taken, by the suffix of their rows."""
    from bigtrain.models.backbone import load_network
    from recipes.features import head_of
    from recipes.trunk import read_network

    given = read_network(config)
    if not config.finetuned:
        return {"" if head_of(given, known) else " pre": given}
    finetuned = load_network(config.finetuned)
    if not head_of(finetuned, known):
        raise ValueError(
            f"--finetuned {config.finetuned} tells other classes apart than the {len(known)} known ones: train it "
            "with recipes/deep_novelty.py --branches one --membership-weight 0 and the same --known, --novel or "
            "--protocol, --order and --seed."
        )
    return {" pre": given, "": finetuned}


class Seen(NamedTuple):
    """What was read of the pictures that could be decoded; those that could not, by split."""

    inputs: dict[str, Inputs]  # "features", and "logits" where the network has a head of the known classes
    held_out_N: NDArray[np.int64]
    test_N: NDArray[np.int64]
    skipped: dict[str, dict[str, str]]


def read_inputs(config: Config, setup: Setup, source: NetworkDetector, data: Data) -> Seen:
    """The features of all images of the run, and of a fine-tuned network the logits."""
    from bigtrain.detectors.logits import MaxLogit
    from bigtrain.detectors.network import NetworkDetector
    from recipes.features import Source, extracted, head_of

    folder = Path(config.features) if config.features else setup.run / "features"
    parts, known_N = data.parts, np.sort(np.concatenate([data.parts.fitted_N, data.parts.held_out_N]))
    head = head_of(source.network, data.protocol.known)
    kinds = {"features": source}
    if head:
        end = replace(source.scoring, layer="", head=head)
        kinds["logits"] = NetworkDetector(source.network, MaxLogit(), end)
    inputs: dict[str, Inputs] = {}
    for kind, its in kinds.items():
        layer = Source.layer(its)
        train = extracted(folder, setup, layer, data.train, known_N)
        test = extracted(folder, setup, layer, data.test, parts.test_N)
        (fitted_N, fitted_ND), (held_out_N, held_out_ND) = train.of(parts.fitted_N), train.of(parts.held_out_N)
        test_N, test_ND = test.of(parts.test_N)
        if kind == "logits":
            fitted_ND, held_out_ND, test_ND = (its.logits_of(x) for x in (fitted_ND, held_out_ND, test_ND))
        label_of = labels_of(source.network.classes[head] if head else data.protocol.known)
        class_N = np.array([only_label(data.train, sample, label_of) for sample in fitted_N.tolist()])
        inputs[kind] = Inputs(its, fitted_ND, class_N, held_out_ND, test_ND)
    return Seen(inputs, held_out_N, test_N, {"train": train.skipped, "test": test.skipped})


def rows_of(
    config: Config, inputs: Mapping[str, Inputs], suffix: str, data: Data, say: Callable[[str], None]
) -> dict[str, tuple[FeatureDetector, Inputs]]:
    """The rows of one network: each detector, and what it is fitted to."""
    has_negative = bool((inputs["features"].fitted_ND < 0).any())
    kernel = "rbf" if has_negative else "intersection"
    options: dict[str, dict[str, Any]] = {
        "one-class SVM": {"nu": config.nu},
        "SVDD": {"nu": config.nu},
        "KNFST": {"kernel": kernel, "landmarks": config.landmarks, "seed": config.seed},
        "local KNFST": {"kernel": kernel, "neighbours": config.local_neighbours},
        "K-extremes": {"share": config.share},
        "Gaussian mixture": {"seed": config.seed},
    }
    rows = {}
    for name in EVERY:
        if config.detectors and name not in config.detectors:
            continue
        kind = detector_class(name)
        if len(data.protocol.known) < kind.fewest_classes:
            say(f"{name} is left out: it tells known classes apart, and there is one")
        elif name in ON_FEATURES:
            rows[name + suffix] = (kind(**options.get(name, {})), inputs["features"])
        elif "logits" in inputs:
            rows[name + suffix] = (kind(), inputs["logits"])
    if has_negative and any("KNFST" in name for name in rows):
        say(f"KNFST{suffix}: these features have negative values, so the kernel is RBF in place of the intersection")
    return rows


def scores_of(
    config: Config, run: RunFolder, setup: Setup, rows: Mapping[str, tuple[FeatureDetector, Inputs]]
) -> dict[str, Scores]:
    """Fit each row, and score the held-out and the test images; the rows are shared among the processes."""
    from accelerate.utils import gather_object

    from bigtrain.detectors.network import NetworkDetector

    accelerator, own = setup.accelerator, []
    for number, (name, (detector, inputs)) in enumerate(rows.items()):
        setup.heartbeat.mark(f"fits {name}")
        if number % accelerator.num_processes == accelerator.process_index:
            began = time.monotonic()
            detector.fit(inputs.fitted_ND, inputs.class_N)
            fitted_s, began = time.monotonic() - began, time.monotonic()
            scores = Scores(score(name, detector, inputs.held_out_ND), score(name, detector, inputs.test_ND))
            print(f"{name}: fitted in {fitted_s:.1f} s, scored in {time.monotonic() - began:.1f} s", flush=True)
            own.append((name, scores))
            if name in config.save:
                saved = NetworkDetector(inputs.source.network, detector, inputs.source.scoring)
                saved.calibrate(scores.held_out_N, config.threshold_percentile / 100)
                saved.save(run / "detectors" / name.replace(" ", "_"))
        setup.stop.leave_if_asked()
    everyone = dict(gather_object(own))
    return {name: everyone[name] for name in rows}


def score(name: str, detector: FeatureDetector, features_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    """The novelty of these images, with a line now and then: local KNFST solves an eigenproblem for each."""
    from bigtrain.detectors.contract import checked
    from recipes.features import LINE_EVERY_S

    checked(features_ND)  # all of them: in parts it would count the bad ones of one part
    began = last_line = time.monotonic()
    scores = [np.zeros(0)]
    for first in range(0, len(features_ND), SCORED_AT_ONCE):
        scores.append(detector.score(features_ND[first : first + SCORED_AT_ONCE]))
        done = min(first + SCORED_AT_ONCE, len(features_ND))
        if time.monotonic() - last_line > LINE_EVERY_S and done < len(features_ND):
            last_line = time.monotonic()
            rate = done / (last_line - began)
            left = clock((len(features_ND) - done) / rate)
            print(f"{name}  {done}/{len(features_ND)} images  {rate:.1f} images/s  left {left}", flush=True)
    return np.concatenate(scores)


def right_answers(data: Data, inputs: Inputs, test: Scored) -> NDArray[np.bool_]:
    """Whether the highest logit is that of a class which the image shows."""
    classes = inputs.source.network.classes[inputs.source.scoring.head]
    answers = [classes[number] for number in inputs.test_ND.argmax(axis=1)]
    shown = [data.test.classes_of(int(sample)) for sample in test.sample_N]
    return np.array([answer in names for answer, names in zip(answers, shown, strict=True)])


def interval(figure: Mapping[str, float]) -> str:
    return f"({figure['low']:.3f} .. {figure['high']:.3f})"


def write_table(path: Path, config: Config, data: Data, table: Mapping[str, Mapping[str, Any]]) -> None:
    """One page with all rows."""
    from bigtrain.evaluation.page import Section, write_page
    from bigtrain.evaluation.report import FIGURES as HEADINGS

    headings = ["detector", *(HEADINGS[figure][0] for figure in FIGURES), "known flagged", "novel missed"]
    rows = []
    for name, figures in table.items():
        cells = [f"{figures[figure]['value']:.3f} {interval(figures[figure])}" for figure in FIGURES]
        threshold = figures["threshold"] or {}
        shares = [f"{threshold[s]:.3f}" if threshold else "" for s in ("known_flagged", "novel_missed")]
        rows.append([name, *cells, *shares])
    lead = [
        f"{data.test.manifest.dataset}: {len(data.protocol.known)} known classes ({', '.join(data.protocol.known)}), "
        f"{len(data.protocol.novel)} novel ones. Rows with pre are of {config.network} as it is given.",
        "Values with 95 % intervals over images. Known flagged and novel missed are the shares of errors at the "
        f"threshold, the {config.threshold_percentile:g}th percentile of held-out known images' scores.",
    ]
    write_page(path, "Classical detectors", lead, [Section("Figures", headings=headings, rows=rows)])


if __name__ == "__main__":
    main()
