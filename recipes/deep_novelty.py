"""Deep novelty: Perera & Patel, "Deep Transfer Learning for Multiple Class Novelty Detection", CVPR 2019.

    accelerate launch recipes/deep_novelty.py --train data/birds --protocol first-half --reference data/imagenet/val \
        --out runs/birds

Known classes and a reference data set go through one trunk with two heads (4.4); the membership loss (4.2) makes the
known head's answers absolute; novelty (4.5) is -max f: high when no known class responds. Ablation of 5.4:
(a) --branches one --membership-weight 0, (b) --branches one, (c) --membership-weight 0, (d) as it is; Finetune(c+C):
--branches joint.
Aims at tables 1 to 3: slurm/sweeps/deep_novelty_table1.toml and on; figures in recipes/README.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from bigtrain.choices import HIGHEST_LR, BatchNorm, Chosen, Variant, setting
from bigtrain.data.protocol import Split, labels_of, seeded_choice
from bigtrain.data.shard_set import ShardSet
from bigtrain.methods.deep_novelty.checks import check_reference, check_settings, overlap_warnings
from bigtrain.runtime.launch import check_batch
from bigtrain.text import clean
from bigtrain.training.mixins import DataMixin, JudgeMixin, NetworkMixin, OptimMixin, RunMixin, check_network
from bigtrain.training.read_split import read_split
from bigtrain.training.run import Recipe, Result, run_recipe

if TYPE_CHECKING:  # what needs torch is imported where it is used
    from bigtrain.models.network import Network
    from bigtrain.training.run_setup import Setup

LEAVES = {"train": "network.safetensors"}


@dataclass(frozen=True)
class Config(RunMixin, JudgeMixin, OptimMixin, NetworkMixin, DataMixin):
    reference: str = ""
    """Shard set of the reference classes, such as ILSVRC12's validation set: any labelled pictures of other things."""
    reference_batch: int = setting(32, 1)  # Reference images a step, over all processes.
    branches: Literal["two", "one", "joint"] = "two"
    """Two heads on one trunk; one: no reference; joint: one softmax over known and reference classes, Finetune(c+C)."""
    ce_weight: float = setting(1.0, 0)  # alpha 1 of eq. 4, of the known classes' cross-entropy.
    membership_weight: float = setting(1.0, 0)  # alpha 2 of eq. 4, of the membership loss.
    true_class_weight: float = setting(5.0, 0)  # lambda of eq. 3, of the true class in the membership loss.
    variant: Variant = "paper"
    """author_code: lambda weighs the wrong classes, as in the authors' code."""

    batch: int = setting(32, 1)  # Known images a step, over all processes.
    steps: int = setting(20_000, 1)
    epochs: int = setting(0, 0)  # Passes over the known images, instead of --steps; 0: use --steps.
    lr: float = setting(1e-3, 0, HIGHEST_LR)
    lr_drop: float = setting(0.1, 0, 1)  # Factor of the learning rate every --lr-drop-every steps.
    lr_drop_every: int = setting(5000, 1)
    momentum: float = setting(0.9, 0, 1)
    weight_decay: float = setting(5e-4, 0)
    mirror: bool = True  # Mirror half of the training images; not for letters.
    batch_norm: BatchNorm = "frozen"
    """Of a network that has it: statistics and scale stay as they were, or are trained further."""
    dropout: float = setting(0.5, 0, 0.99)
    """At fc6 and fc7, which VGG and AlexNet have; other networks have no such layers."""
    filter_images: int = setting(2000, 0)
    """At most this many known, novel and reference images each are used for filters.html (4.3); 0: no such page."""


class Data(NamedTuple):
    split: Split
    reference: ShardSet | None


def check(config: Config) -> None:
    check_network(config)
    check_settings(config)
    for batch in (config.batch, config.reference_batch) if config.reference else (config.batch,):
        check_batch(batch, config.run.accumulate)


def read(config: Config) -> Data:
    split = read_split(config, fewest_classes=2, single_labels=True)
    if not config.reference:
        return Data(split, None)
    reference = ShardSet(config.reference)
    check_reference(reference, split)
    return Data(split, reference)


def load(config: Config, data: Data, precision: Chosen) -> Network:
    from bigtrain.training.trunk import check_training, read_network

    given = read_network(config)
    check_training(given.trunk, config.batch_norm, config.run)
    return given


def deep_novelty(config: Config, setup: Setup, data: Data, given: Network) -> Result:
    """Train the two branches (4.4), then score by the known head (4.5)."""
    from bigtrain.detectors.classical.logits import MaxLogit
    from bigtrain.detectors.classical.nearest import pixel_features
    from bigtrain.methods.deep_novelty.page import images_by_kind, write_filters
    from bigtrain.training.judging import judged
    from bigtrain.training.trunk import network_detector

    (split, reference), known, said = data, data.split.protocol.known, f"deep novelty: {data.split}"
    if reference:
        said += f", reference {reference.manifest.dataset}, {len(reference)} of {len(reference.classes)}"
    setup.announce(f"{said}; {given.described}")
    for warning in overlap_warnings(split.protocol, reference) if reference else ():
        setup.accelerator.print(clean(warning))
    given.to(setup.accelerator.device)
    network = train(config, setup, data, given)

    max_logit = MaxLogit().fit(np.zeros((1, len(known))))
    detector = network_detector(network, max_logit, config, setup.precision, head="known")
    before = network_detector(given, MaxLogit(), config, setup.precision)
    method = {"two": "deep novelty", "one": "one branch", "joint": "Finetune(c+C)"}[config.branches]
    plain = {"pixels": pixel_features, "features of the given network": before.outputs}
    result = judged(config, setup, split, detector, method=method, plain=plain, classes=known)
    if not (reference and config.filter_images):
        return result
    chosen = partial(seeded_choice, limit=config.filter_images, seed=config.seed)
    streams = {
        kind: setup.in_order(of, chosen(sample_N), detector.view(), config.score_batch)
        for kind, (of, sample_N) in images_by_kind(split, reference).items()
    }
    features = network_detector(network, MaxLogit(), config, setup.precision).outputs
    filters = write_filters(setup.run / "filters.html", setup.accelerator, streams, features, network)
    return result._replace(record={**result.record, "filters": filters})


def train(config: Config, setup: Setup, data: Data, given: Network) -> Network:
    """4.4: the trunk learns to tell the known classes apart and, in the other branch, the reference classes. Leaves
    network.safetensors in the run folder, which ends the stage."""
    import torch

    from bigtrain.data.mixture import Mixture
    from bigtrain.data.views import RandomCrop
    from bigtrain.methods.deep_novelty.equations import branch_losses
    from bigtrain.methods.deep_novelty.network import Branches
    from bigtrain.training import trunk
    from bigtrain.training.optim import scaled_lr, set_schedule, sgd
    from bigtrain.training.stage import Stage

    if trained_network := setup.left(LEAVES["train"]):
        return trained_network
    sets = {"known": (data.split.train, data.split.fitted_N, config.batch, data.split.protocol.known)}
    if reference := data.reference:
        sets["reference"] = (reference, np.arange(len(reference)), config.reference_batch, reference.classes)
    view = RandomCrop(config.image_size, config.resize, config.mirror)
    plans = {
        name: trunk.without_padding(of.plan(sample_N, batch, config.seed), given.trunk, config.batch_norm)
        for name, (of, sample_N, batch, _) in sets.items()
    }
    streams = {name: setup.stream(of, plans[name], view) for name, (of, *_) in sets.items()}
    classes = {name: names for name, (*_, names) in sets.items()}
    label_of = {name: labels_of(names) for name, names in classes.items()}
    is_joint = config.branches == "joint"

    def branches() -> Branches:
        torch.manual_seed(config.seed)
        counts = {name: len(names) for name, names in classes.items()}
        backbone = copy.deepcopy(given.backbone).requires_grad_(True)
        return trunk.prepare_batch_norm(Branches(backbone, counts, joint=is_joint), config.batch_norm)

    model = branches().train()
    trunk.prepare_trunk(model.trunk, setup.settings, config.dropout)
    lr = scaled_lr(config.lr, config.batch, config.lr_batch)
    stage = Stage(
        "train", setup,
        trained=model, optimizer=sgd(model, setup.accelerator.device, lr=lr, momentum=config.momentum),
        clip=config.clip,
        stream=Mixture(streams), steps=config.epochs * plans["known"].batches_per_epoch or config.steps,
        flops_per_image=3 * given.flops(config.image_size),
    )  # fmt: skip

    for step in stage:
        factor = config.lr_drop ** (stage.step // config.lr_drop_every)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.weight_decay)
        for part in step.parts():
            with setup.autocast():
                logits = stage.module({name: given.normalise(batch.views["image"]) for name, batch in part.items()})
            class_B = {name: trunk.class_numbers(sets[name][0], b, label_of[name]) for name, b in part.items()}
            losses = branch_losses(
                logits, class_B,
                ce_weight=config.ce_weight, membership_weight=0 if is_joint else config.membership_weight,
                true_class_weight=config.true_class_weight, variant=config.variant, first_class=model.first_class,
            )  # eq. 4  # fmt: skip
            step.backward(torch.stack([setup.mean(batch, losses[name]) for name, batch in part.items()]).sum())
        step.update(lr=factor * lr)

    trained = trunk.with_batch_norm(stage.into(branches()))
    network = given.with_backbone(trained.trunk, heads=trained.linear_heads(), classes=classes)
    return setup.leave(LEAVES["train"], network)


main = partial(run_recipe, Recipe("deep_novelty", Config, __doc__ or "", check, read, load, deep_novelty, LEAVES))

if __name__ == "__main__":
    main()
