"""Extreme value signatures: Schultheiss et al., "Finding the Unknown: Novelty Detection with Extreme Value Signatures
of Deep Neural Activations", GCPR 2017.

    accelerate launch recipes/signatures.py --train data/train --test data/test --known cat dog --out runs/pets

Nothing is trained: one pass over the known images adds up each class's activations of a layer; a class is the set of
its strongest dimensions, and novelty is what no class's set shares with a picture's own strongest.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigtrain.choices import Overlap
from bigtrain.data.protocol import seeded_choice
from bigtrain.data.workers import prepare_workers
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.launch import check_launch
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import Limits, check_ranges, print_if_asked, read_settings, result_settings
from bigtrain.text import clock
from recipes.network_settings import (
    NETWORK_LIMITS,
    Data,
    NetworkConfig,
    check_names,
    check_settings,
    check_single_labels,
    labels_of,
    read_data,
)

if TYPE_CHECKING:  # what needs torch is imported where it is used, behind all mistakes that can be told without
    import numpy as np
    from numpy.typing import NDArray

    from bigtrain.data.views import CentreCrop
    from bigtrain.detectors.network import NetworkDetector
    from recipes.run_setup import Setup


@dataclass(frozen=True)
class Config(NetworkConfig):
    layer: str = ""
    """The layer whose activations are taken, by torch's name; empty: what the classifier would see (fc7 of VGG16)."""
    share: float = 0.1
    """Share of the dimensions that make a signature."""
    overlap: Overlap = "share"
    """How much of a signature a picture has: the share of its dimensions, that weighted by their mean activation, or
    the cosine between the picture's activations and the signature."""


LIMITS: Limits = {**NETWORK_LIMITS, "share": (1e-6, 1 - 1e-6)}


def main(argv: list[str] | None = None) -> None:
    with user_errors("signatures.py"):
        argv = sys.argv[1:] if argv is None else argv
        config = read_settings(Config, argv, description=__doc__)
        check_ranges(config, LIMITS)
        print_if_asked(config, argv)
        check_settings(config)
        check_launch()
        run = RunFolder(config.run.out, config)
        if run.is_already_finished():
            return
        data = read_data(config)
        check_single_labels(data.train, data.parts.fitted_N, data.protocol.known)
        check_names(config)
        signatures(config, run, data)


def signatures(config: Config, run: RunFolder, data: Data) -> None:
    began = time.monotonic()
    prepare_workers(config.run.workers)
    from bigtrain.data.pictures import jpeg_decoder
    from bigtrain.data.views import CentreCrop
    from bigtrain.detectors.neighbours import pixel_features
    from bigtrain.detectors.network import NetworkDetector, Scoring
    from bigtrain.detectors.signatures import Signatures
    from bigtrain.runtime.precision import choose_precision
    from recipes.run_setup import Setup
    from recipes.trunk import read_network

    parts, views = data.parts, CentreCrop(config.image_size, config.resize)
    network = read_network(config)
    precision = run.resolved("precision") or choose_precision(config.precision)
    scoring = Scoring(
        image_size=config.image_size, resize=config.resize, precision=precision, batch=config.score_batch,
        layer=config.layer, head="",
    )  # fmt: skip
    detector = NetworkDetector(network, Signatures(config.share, config.overlap), scoring)
    setup = Setup.begin(run, precision, {})
    accelerator = setup.accelerator
    network.to(accelerator.device)
    accelerator.print(
        f"signatures: {data.train.manifest.dataset}, {len(parts.fitted_N)} images of {len(data.protocol.known)} known "
        f"classes to fit and {len(parts.test_N)} to judge; {network.architecture.model}, {network.report}, layer "
        f"{config.layer or 'before the classifier'}; {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, precision {precision}, JPEGs by {jpeg_decoder()}"
    )
    mean_CD = class_means(setup, data, views, detector, config.score_batch)
    fitted = Signatures(config.share, config.overlap).from_means(mean_CD, list(data.protocol.known))
    detector = NetworkDetector(network, fitted, scoring)

    from bigtrain.evaluation.judge import judge
    from bigtrain.evaluation.signatures import write_signatures

    bank_N = seeded_choice(parts.fitted_N, config.neighbours_bank, config.seed)
    results = judge(
        run.path,
        accelerator,
        detector,
        method="extreme value signatures",
        protocol=data.protocol,
        test=setup.in_order(data.test, parts.test_N, views, config.score_batch),
        held_out=setup.in_order(data.train, parts.held_out_N, views, config.score_batch)
        if len(parts.held_out_N)
        else None,
        bank=setup.in_order(data.train, bank_N, views, config.score_batch),
        plain={"pixels": pixel_features, "the same features": detector.outputs},
        settings=result_settings(config),
        seed=config.seed,
        quantile=config.threshold_percentile / 100,
    )
    write_signatures(
        run / "signatures.html",
        accelerator,
        fitted,
        setup.in_order(data.train, bank_N, views, config.score_batch),
        detector.outputs,
    )
    if accelerator.is_main_process:
        run.finish(results)
    setup.end_trackers()
    plain = ", ".join(f"{name} {figures['auroc']['value']:.3f}" for name, figures in results["comparisons"].items())
    auroc = results["auroc"]
    accelerator.print(
        f"AUROC {auroc['value']:.3f} (95 % interval {auroc['low']:.3f} to {auroc['high']:.3f}); {plain}; "
        f"this start took {clock(time.monotonic() - began)}; reports: {run / 'report.html'}, {run / 'signatures.html'}"
    )


def class_means(
    setup: Setup, data: Data, views: CentreCrop, detector: NetworkDetector, batch: int
) -> NDArray[np.float64]:
    """The mean features of each known class, (C, D), from one pass over its images, shared among the processes."""
    import torch

    from bigtrain.detectors.contract import checked
    from recipes.trunk import class_numbers

    sample_N = data.parts.fitted_N
    device, label_of = setup.accelerator.device, labels_of(data.protocol.known)
    stream = setup.in_order(data.train, sample_N, views, batch)
    sum_CD = torch.zeros(0)
    count_C = torch.zeros(len(label_of), dtype=torch.float64, device=device)
    for part in stream.batches():
        part = part.to(device)
        features_BD = detector.outputs(part.views["image"]).double()
        checked(features_BD.cpu().numpy())
        if not sum_CD.numel():
            sum_CD = torch.zeros(len(label_of), features_BD.shape[1], dtype=torch.float64, device=device)
        class_B, weight_B = class_numbers(data.train, part, label_of), part.weight_B.double()
        sum_CD.index_add_(0, class_B, features_BD * weight_B[:, None])
        count_C.index_add_(0, class_B, weight_B)
    sum_CD, count_C = setup.accelerator.reduce((sum_CD, count_C), reduction="sum")
    if setup.accelerator.num_processes > 1:
        stream.budget.agree(0, len(sample_N) - int(count_C.sum()))
    if bool((count_C == 0).any()):
        empty = [name for name, count in zip(data.protocol.known, count_C.tolist(), strict=True) if not count]
        raise ValueError(f"no image of {', '.join(empty[:10])} could be decoded: nothing is known of it.")
    return (sum_CD / count_C[:, None]).cpu().numpy()


if __name__ == "__main__":
    main()
