"""PANDA: Reiss, Cohen, Bergman & Hoshen, "PANDA: Adapting Pretrained Features for Anomaly Detection and Segmentation",
CVPR 2021.

    accelerate launch recipes/panda.py --train data/train --test data/test --known dog --out runs/panda-dog

The last layers of a pretrained network are trained for a few epochs so that known images come close to their centre
(compactness loss, eq. 1); novelty is the distance to the two nearest known images (DN2). Implemented: early stopping,
that is a fixed number of epochs (PANDA-Early). Not: EWC, whose Fisher diagonal comes from ImageNet, and outlier
exposure. Batch norm is frozen whole; in the authors' code its scale learns. Aims at table 1 (CIFAR-10, uni-class,
ResNet-152: 96.2): slurm/sweeps/panda_cifar10.toml.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bigtrain.choices import HIGHEST_LR, Chosen, setting
from bigtrain.data.protocol import Split, seeded_choice
from bigtrain.runtime.launch import check_batch
from bigtrain.training.mixins import DataMixin, JudgeMixin, NetworkMixin, OptimMixin, RunMixin, check_network
from bigtrain.training.read_split import read_split
from bigtrain.training.run import Recipe, Result, run_recipe

if TYPE_CHECKING:  # what needs torch is imported where it is used
    from bigtrain.models.network import Network
    from bigtrain.training.run_setup import Setup

LEAVES = {"adapt": "network.safetensors"}


@dataclass(frozen=True)
class Config(RunMixin, JudgeMixin, OptimMixin, NetworkMixin, DataMixin):
    network: str = "resnet152.tv_in1k"  # A timm name, alexnet, or a local .safetensors or .pth.
    tuned_layers: tuple[str, ...] = ("layer3", "layer4")
    """Layers that learn, by torch's name; all others stay as they are."""
    epochs: int = setting(15, 1)
    batch: int = setting(32, 1)  # Images a step, over all processes.
    lr: float = setting(1e-2, 0, HIGHEST_LR)
    momentum: float = setting(0.9, 0, 1)
    weight_decay: float = setting(5e-5, 0)
    clip: float = setting(1e-3, 0)  # Largest norm of the gradient; 0: not clipped.
    neighbours: int = setting(2, 1)  # k of the score: the sum of the squared distances to this many known images (DN2).


def check(config: Config) -> None:
    check_network(config)
    check_batch(config.batch, config.run.accumulate)


def load(config: Config, split: Split, precision: Chosen) -> Network:
    from bigtrain.methods.panda.equations import freeze_all_but
    from bigtrain.training.trunk import check_training, read_network

    given = read_network(config)
    check_training(given.trunk, "frozen", config.run)
    freeze_all_but(given.backbone, config.tuned_layers)  # refuses layers that do not exist
    return given


def panda(config: Config, setup: Setup, split: Split, given: Network) -> Result:
    """Adapt the network, then score by nearest neighbours on its features; the given network's stand beside."""
    from bigtrain.detectors.classical.nearest import NearestNeighbours, pixel_features
    from bigtrain.evaluation.collect import collect
    from bigtrain.training.judging import judged
    from bigtrain.training.trunk import network_detector

    setup.announce(f"PANDA: {split}; {given.described}")
    before = network_detector(given.to(setup.accelerator.device), NearestNeighbours(), config, setup.precision)
    network = adapt(config, setup, split, given)
    knn = NearestNeighbours(config.neighbours)
    detector = network_detector(network, knn, config, setup.precision)
    bank_N = seeded_choice(split.fitted_N, config.neighbours_bank, config.seed)
    bank = setup.in_order(split.train, bank_N, detector.view(), config.score_batch)
    knn.fit(collect(setup.accelerator, bank, {"features": detector.outputs})[1]["features"])
    plain = {"pixels": pixel_features, "features of the given network": before.outputs}
    return judged(config, setup, split, detector, method="PANDA", plain=plain)


def adapt(config: Config, setup: Setup, split: Split, given: Network) -> Network:
    """3.2: known images come close to their centre. Leaves network.safetensors, which ends the stage."""
    import torch

    from bigtrain.data.views import CentreCrop
    from bigtrain.evaluation.collect import mean_over
    from bigtrain.methods.panda.equations import compactness_loss, freeze_all_but
    from bigtrain.training.optim import scaled_lr, set_schedule, sgd
    from bigtrain.training.stage import Stage
    from bigtrain.training.trunk import prepare_batch_norm, prepare_trunk, with_batch_norm

    if adapted := setup.left(LEAVES["adapt"]):
        return adapted
    view, features = CentreCrop(config.image_size, config.resize), given.pooled()
    known = setup.in_order(split.train, split.fitted_N, view, config.score_batch)
    with torch.no_grad(), setup.autocast():
        centre_D = mean_over(setup.accelerator, known, lambda image_B3HW: features(given.normalise(image_B3HW)).float())
    model = prepare_batch_norm(copy.deepcopy(given.backbone), "frozen")
    freeze_all_but(model, config.tuned_layers)
    prepare_trunk(model, config.run, dropout=0.0)
    lr = scaled_lr(config.lr, config.batch, config.lr_batch)
    plan = split.train.plan(split.fitted_N, config.batch, config.seed)
    steps = config.epochs * plan.batches_per_epoch
    stage = Stage(
        "adapt", setup,
        trained=model, optimizer=sgd(model, setup.accelerator.device, lr=lr, momentum=config.momentum),
        clip=config.clip, stream=setup.stream(split.train, plan, view, steps=steps), steps=steps,
        flops_per_image=3 * given.flops(config.image_size),
    )  # fmt: skip

    for step in stage:
        set_schedule(stage.optimizer, lr_factor=1.0, weight_decay=config.weight_decay)
        for part in step.parts():
            with setup.autocast():
                features_BD = stage.module(given.normalise(part.views["image"]))
            step.backward(setup.mean(part, compactness_loss(features_BD, centre_D)))  # eq. 1
        step.update(lr=lr)

    trained = with_batch_norm(stage.into(prepare_batch_norm(copy.deepcopy(given.backbone), "frozen")))
    return setup.leave(LEAVES["adapt"], given.with_backbone(trained))


main = partial(run_recipe, Recipe("panda", Config, __doc__ or "", check, read_split, load, panda, LEAVES))

if __name__ == "__main__":
    main()
