"""Deep novelty: Perera & Patel, "Deep Transfer Learning for Multiple Class Novelty Detection", CVPR 2019.

    accelerate launch recipes/deep_novelty.py --train data/birds --protocol first-half --reference data/imagenet/val \
        --out runs/birds

Known classes and a reference data set go through one trunk with two heads (4.4); the membership loss (4.2) makes the
known head's answers absolute; novelty (4.5) = no known class answers: - max f. Ablation of 5.4: (a) --branches one
--membership-weight 0, (b) --branches one, (c) --membership-weight 0, (d) as it is; Finetune(c+C): --branches joint.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from bigtrain.choices import HIGHEST_LR, BatchNorm
from bigtrain.data.protocol import seeded_choice
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.workers import prepare_workers
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.launch import check_batch, check_launch
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import Limits, check_ranges, print_if_asked, read_settings, result_settings
from bigtrain.text import clean, clock
from recipes.network_settings import (
    NETWORK_LIMITS,
    Data,
    NetworkConfig,
    check_names,
    check_settings,
    check_single_labels,
    labels_of,
    read_data,
    shared_classes,
)

if TYPE_CHECKING:  # what needs torch is imported where it is used, behind all mistakes that can be told without
    from bigtrain.models.backbone import Branches, Network
    from recipes.run_setup import Setup

LEAVES = {"train": "network.safetensors"}
MAX_NAMED = 10


@dataclass(frozen=True)
class Config(NetworkConfig):
    reference: str = ""
    """Shard set of the reference classes, such as ILSVRC12's validation set: any labelled pictures of other things."""
    reference_batch: int = 32
    """Reference images a step, over all processes."""
    branches: Literal["two", "one", "joint"] = "two"
    """Two heads on one trunk; one: no reference; joint: one softmax over known and reference classes, Finetune(c+C)."""
    ce_weight: float = 1.0
    """alpha 1, of the known classes' cross-entropy."""
    membership_weight: float = 1.0
    """alpha 2, of the membership loss."""
    true_class_weight: float = 5.0
    """lambda, of the true class in the membership loss."""
    variant: Literal["paper", "author_code"] = "paper"
    """author_code: lambda weighs the wrong classes, as in the authors' code."""

    batch: int = 32
    """Known images a step, over all processes."""
    steps: int = 20_000
    epochs: int = 0
    """Passes over the known images, in place of --steps; 0: by --steps."""
    lr: float = 1e-3
    lr_drop: float = 0.1
    """Factor of the learning rate every --lr-drop-every steps."""
    lr_drop_every: int = 5000
    momentum: float = 0.9
    weight_decay: float = 5e-4
    mirror: bool = True
    """Mirror half of the training pictures; not for letters."""
    batch_norm: BatchNorm = "frozen"
    """Of a network that has it: statistics and scale stay as they were trained, or are trained on."""
    dropout: float = 0.5
    """At fc6 and fc7, which VGG and AlexNet have; other networks have no such layers."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: not clipped."""
    filter_images: int = 2000
    """At most so many known, novel and reference images each are looked at for filters.html; 0: no such page."""


LIMITS: Limits = {
    **NETWORK_LIMITS,
    **dict.fromkeys(("batch", "reference_batch", "steps", "lr_drop_every"), (1, math.inf)),
    **dict.fromkeys(("epochs", "ce_weight", "membership_weight", "true_class_weight"), (0, math.inf)),
    **dict.fromkeys(("weight_decay", "clip", "filter_images"), (0, math.inf)),
    **dict.fromkeys(("momentum", "lr_drop"), (0, 1)),
    "dropout": (0, 0.99),
    "lr": (0, HIGHEST_LR),
}


def main(argv: list[str] | None = None) -> None:
    with user_errors("deep_novelty.py"):
        argv = sys.argv[1:] if argv is None else argv
        config = read_settings(Config, argv, description=__doc__)
        check_ranges(config, LIMITS)
        print_if_asked(config, argv)
        check_settings(config)
        check(config)
        run = RunFolder(config.run.out, config)
        if run.is_already_finished():
            return
        data = read_data(config, fewest_classes=2)
        check_single_labels(data.train, data.parts.fitted_N, data.protocol.known)
        reference = read_reference(config, data) if config.reference else None
        check_names(config)
        deep_novelty(config, run, data, reference)


def check(config: Config) -> None:
    """Refuse settings that contradict each other, or without effect."""
    if (config.branches == "one") == bool(config.reference):
        given = "is of no use with --branches one" if config.reference else "SHARDS is needed (or --branches one)"
        raise ValueError(f"--reference {given}: it is what the second branch classifies.")
    if config.branches == "joint" and config.membership_weight not in (0, Config.membership_weight):
        raise ValueError(
            "--membership-weight has no effect with --branches joint, which has one softmax: leave it out."
        )
    if config.epochs and config.steps != Config.steps:
        raise ValueError("--steps and --epochs were both given: how long to train is one of them.")
    if config.variant == "author_code" and not (config.membership_weight and config.branches != "joint"):
        raise ValueError("--variant author_code is about the membership loss, which is not taken: leave it out.")
    check_launch()
    check_batch(config.batch, config.run.accumulate)
    if config.reference:
        check_batch(config.reference_batch, config.run.accumulate)


def read_reference(config: Config, data: Data) -> ShardSet:
    """The reference data set, which is another one than that of known and novel classes."""
    reference = ShardSet(config.reference)
    for name, known in (("--train", data.train), ("--test", data.test)):
        if shared := reference.shared_pictures(known):
            raise ValueError(
                f"--reference {config.reference} has {shared} pictures of {name} {known.url}: the reference data set "
                "must show other things than the known and novel classes; `bigtrain-shards split` takes classes."
            )
    check_single_labels(reference, np.arange(len(reference)), reference.classes)
    return reference


def warnings_of(data: Data, reference: ShardSet) -> Iterator[str]:
    """What is wrong with reference classes that are known or novel ones too."""
    for kind, names in (("known", data.protocol.known), ("novel", data.protocol.novel)):
        if pairs := shared_classes(names, reference.classes):
            listed = ", ".join(a if a == b else f"{a} ({b})" for a, b in pairs[:MAX_NAMED])
            more = f" and {len(pairs) - MAX_NAMED} more" if len(pairs) > MAX_NAMED else ""
            why = (
                "their filters cannot be negative for all known classes"
                if kind == "known"
                else "novel classes have been seen in training, so that the figures are too good"
            )
            yield f"warning: {len(pairs)} {kind} classes are reference classes too, {why}: {listed}{more}"


def deep_novelty(config: Config, run: RunFolder, data: Data, reference: ShardSet | None) -> None:
    began = time.monotonic()
    prepare_workers(config.run.workers)
    from bigtrain.data.pictures import jpeg_decoder
    from bigtrain.data.views import CentreCrop
    from bigtrain.runtime.precision import choose_precision
    from recipes.run_setup import Setup
    from recipes.trunk import check_training, read_network

    given = read_network(config)
    check_training(given.trunk, config.batch_norm, config.run)
    precision = run.resolved("precision") or choose_precision(config.precision)
    setup = Setup.begin(run, precision, LEAVES)
    accelerator = setup.accelerator
    known_classes = data.protocol.known
    accelerator.print(
        f"deep novelty: {data.train.manifest.dataset}, {len(data.parts.fitted_N)} images of {len(known_classes)} known "
        f"classes to train on and {len(data.parts.test_N)} to judge; "
        + (
            f"reference {reference.manifest.dataset}, {len(reference)} of {len(reference.classes)}; "
            if reference
            else ""
        )
        + f"{given.architecture.model}, {given.report}; {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, precision {precision}, JPEGs by {jpeg_decoder()}"
    )
    for warning in warnings_of(data, reference) if reference else ():
        accelerator.print(clean(warning))
    given.to(accelerator.device)
    network = train(config, setup, data, reference, given)

    from bigtrain.detectors.logits import MaxLogit
    from bigtrain.detectors.neighbours import pixel_features
    from bigtrain.detectors.network import NetworkDetector, Scoring
    from bigtrain.evaluation.filters import write_filters
    from bigtrain.evaluation.judge import judge

    views = CentreCrop(config.image_size, config.resize)
    scoring = Scoring(
        image_size=config.image_size, resize=config.resize, precision=precision, batch=config.score_batch,
        layer="", head="known",
    )  # fmt: skip
    before = NetworkDetector(given, MaxLogit(), replace(scoring, head=""))
    parts = data.parts
    bank_N = seeded_choice(parts.fitted_N, config.neighbours_bank, config.seed)
    detector = NetworkDetector(network, MaxLogit().fit(np.zeros((1, len(known_classes)))), scoring)
    results = judge(
        run.path,
        accelerator,
        detector,
        method={"two": "deep novelty", "one": "one branch", "joint": "Finetune(c+C)"}[config.branches],
        protocol=data.protocol,
        test=setup.in_order(data.test, parts.test_N, views, config.score_batch),
        held_out=setup.in_order(data.train, parts.held_out_N, views, config.score_batch)
        if len(parts.held_out_N)
        else None,
        bank=setup.in_order(data.train, bank_N, views, config.score_batch),
        plain={"pixels": pixel_features, "features of the given network": before.outputs},
        settings=result_settings(config),
        seed=config.seed,
        quantile=config.threshold_percentile / 100,
        classes=known_classes,
    )
    if reference and config.filter_images:
        is_known_N = data.protocol.is_known(data.test)[parts.test_N]
        images = {
            "known": (data.test, parts.test_N[is_known_N]),
            "novel": (data.test, parts.test_N[~is_known_N]),
            "reference": (reference, np.arange(len(reference))),
        }
        streams = {
            kind: setup.in_order(
                shard_set, seeded_choice(sample_N, config.filter_images, config.seed), views, config.score_batch
            )
            for kind, (shard_set, sample_N) in images.items()
        }
        features = NetworkDetector(network, MaxLogit(), replace(scoring, head="")).outputs
        results["filters"] = write_filters(
            run / "filters.html", accelerator, streams, features,
            known_CD=network.heads["known"].weight, reference_CD=network.heads["reference"].weight,
            known_classes=known_classes, reference_classes=reference.classes,
        )  # fmt: skip
    if accelerator.is_main_process:
        run.finish(results)
    setup.end_trackers()
    auroc, accuracy = results["auroc"], results["closed_set_accuracy"]
    plain = ", ".join(f"{name} {figures['auroc']['value']:.3f}" for name, figures in results["comparisons"].items())
    accelerator.print(
        f"AUROC {auroc['value']:.3f} (95 % interval {auroc['low']:.3f} to {auroc['high']:.3f}), closed-set accuracy "
        f"{accuracy['value']:.3f}; {plain}; this start took {clock(time.monotonic() - began)}; report: "
        f"{run / 'report.html'}"
    )


def train(config: Config, setup: Setup, data: Data, reference: ShardSet | None, given: Network) -> Network:
    """4.4: the trunk learns to tell the known classes apart and, in the other branch, the reference classes. Leaves
    network.safetensors in the run folder, which ends the stage."""
    import torch
    import torch.nn.functional as F

    from bigtrain.data.mixture import Mixture
    from bigtrain.data.views import RandomCrop, to_float
    from bigtrain.models.backbone import Branches, load_network, network_flops, save_network
    from bigtrain.objectives.losses import membership_risk
    from bigtrain.runtime.optim import set_schedule
    from recipes.stage import Stage
    from recipes.trunk import (
        class_numbers,
        prepare_batch_norm,
        set_dropout,
        set_recompute,
        with_batch_norm,
        without_padding,
    )

    accelerator, network_file = setup.accelerator, setup.run / LEAVES["train"]
    if network_file.is_file():
        return load_network(str(network_file)).to(accelerator.device)
    view = RandomCrop(config.image_size, config.resize, config.mirror)
    plan = data.train.plan(data.parts.fitted_N, config.batch, config.seed)
    plan = without_padding(plan, given.trunk, config.batch_norm)
    streams, classes = {"known": setup.stream(data.train, plan, view)}, {"known": data.protocol.known}
    if reference:
        everything = reference.plan(np.arange(len(reference)), config.reference_batch, config.seed)
        everything = without_padding(everything, given.trunk, config.batch_norm)
        streams["reference"], classes["reference"] = setup.stream(reference, everything, view), reference.classes
    label_of = {name: labels_of(names) for name, names in classes.items()}
    is_joint = config.branches == "joint"
    first_label = {"known": 0, "reference": len(classes["known"]) if is_joint else 0}

    def branches() -> Branches:
        torch.manual_seed(config.seed)
        counts = {name: len(names) for name, names in classes.items()}
        return Branches(copy.deepcopy(given.trunk).requires_grad_(True), counts, joint=is_joint)

    model = prepare_batch_norm(branches(), config.batch_norm).train()
    set_dropout(model.trunk, config.dropout)
    set_recompute(model.trunk, setup.settings)
    stage = Stage(
        "train", setup,
        trained=model, clip=config.clip,
        optimizer=torch.optim.SGD(
            [{"params": [*model.parameters()], "base_lr": config.lr, "decays": True}],
            lr=config.lr, momentum=config.momentum,
        ),
        stream=Mixture(streams), steps=config.epochs * plan.batches_per_epoch or config.steps,
        flops_per_image=3 * network_flops(given.trunk, config.image_size),
    )  # fmt: skip
    weights = {"true_class_weight": config.true_class_weight}
    if config.variant == "author_code":
        weights = {"true_class_weight": 1.0, "wrong_class_weight": config.true_class_weight}

    for batches in stage.batches():
        factor = config.lr_drop ** (stage.step // config.lr_drop_every)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.weight_decay)
        for part in stage.parts(batches):
            images = {name: to_float(batch.views["image"], given.mean, given.std) for name, batch in part.items()}
            with setup.autocast():
                logits = stage.module(images)
            loss = torch.zeros((), device=accelerator.device)
            for name, batch in part.items():
                class_B = class_numbers(streams[name].shard_set, batch, label_of[name])
                loss_B = F.cross_entropy(logits[name].float(), class_B + first_label[name], reduction="none")  # L_ce
                if name == "known":
                    loss_B = config.ce_weight * loss_B
                    if config.membership_weight and not is_joint:
                        loss_B = loss_B + config.membership_weight * membership_risk(logits[name], class_B, **weights)
                loss = loss + batch.mean(loss_B, accelerator.num_processes)  # eq. 4
            stage.backward(loss)
        stage.update()
        stage.advance(batches, lr=factor * config.lr)

    trained = with_batch_norm(stage.into(prepare_batch_norm(branches(), config.batch_norm)))
    network = replace(given, trunk=trained.trunk, heads=trained.linear_heads(), classes=classes)
    if accelerator.is_main_process:
        save_network(network_file, network)
    return network.to(accelerator.device)


if __name__ == "__main__":
    main()
