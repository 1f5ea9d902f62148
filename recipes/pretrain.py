"""Supervised training of a network on labelled shards: makes a teacher or trunk where none can be downloaded.

    accelerate launch recipes/pretrain.py --train data/reference/train --val data/reference/val --out runs/teacher

The network.safetensors of its run serves as `--teacher` of recipes/defend.py (a ViT's) and as `--network` of the other
recipes, with its classifier. After Steiner et al. 2021 (AugReg): random resized crops, mirroring, label smoothing,
AdamW, warm-up and cosine. The Finetune of Perera & Patel is row (a) of recipes/deep_novelty.py, by its own recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from bigtrain.choices import HIGHEST_LR, BatchNorm, Chosen, Schedule, is_local, setting
from bigtrain.data.protocol import labels_of
from bigtrain.models.timm_names import check_network_name, check_source
from bigtrain.runtime.launch import check_batch, check_moving_average
from bigtrain.training.mixins import OptimMixin, RunMixin
from bigtrain.training.read_labelled import Labelled, read_labelled
from bigtrain.training.run import Recipe, Result, run_recipe

if TYPE_CHECKING:  # what needs torch is imported where it is used
    from torch import Tensor

    from bigtrain.models.network import Network
    from bigtrain.training.run_setup import Setup

LEAVES = {"pretrain": "network.safetensors"}
DEFAULT_SIZE = 224


@dataclass(frozen=True)
class Config(RunMixin, OptimMixin):
    train: str = ""  # Shard set to train on; each image shows one class.
    val: str = ""  # Shard set to report top-1 and top-5 on; without it, a seeded share of train is held out.
    validation_share: float = setting(0.05, 0, 0.9)  # Share of train that is held out where there is no --val.
    known: tuple[str, ...] = ()  # Train on these classes only; with neither this nor --novel on all.
    novel: tuple[str, ...] = ()  # Or on all but these.

    model: str = "vit_small_patch16_224"
    """A timm network, or alexnet; or a local file, whose weights training begins with. The three settings below change
    the definition of a vit_* where they are not 0."""
    arch: str = ""  # The network that a local file's weights belong to; bigtrain's own files record theirs.
    pretrained: bool = False  # Begin with timm's weights for that name.
    image_size: int = setting(0, 0)
    patch_size: int = setting(0, 0)
    depth: int = setting(0, 0)
    pool: Literal["token", "both"] = "token"
    """What of a ViT is classified: the [CLS] token, or that and the mean of the patch tokens."""
    batch_norm: BatchNorm = "trained"
    """Of a network that has it: trained over the batches of all processes, or kept as it was."""

    epochs: int = setting(100, 1)
    batch: int = setting(256, 1)  # Images a step, over all processes.
    lr: float = setting(1e-3, 0, HIGHEST_LR)
    weight_decay: float = setting(0.05, 0)
    warmup_epochs: float = setting(5.0, 0)
    drop_path: float = setting(0.1, 0, 0.99)
    dropout: float = setting(0.5, 0, 0.99)
    """At fc6 and fc7, which VGG and AlexNet have; other networks have no such layers."""
    label_smoothing: float = setting(0.1, 0, 0.99)
    crop_scale: tuple[float, float] = setting((0.25, 1.0), 0.001, 1)
    mirror: bool = True  # Mirror half of the training images; not for letters.
    schedule: Schedule = "cosine"
    layer_decay: float = setting(1.0, 1e-3, 1)  # Each block's learning rate is that of the block after it times this.
    ema: float = setting(0.0, 0, 1)  # Momentum of a moving average of the weights, which becomes the network; 0: none.
    clip: float = setting(1.0, 0)  # Largest norm of the gradient; 0: not clipped.
    weights: Literal["fp32", "fp16"] = "fp32"  # How the network is stored; the figures are of the weights as stored.


def check(config: Config) -> None:
    is_file = is_local(config.model)
    if is_file and (config.patch_size or config.depth or config.pretrained):
        raise ValueError(f"{config.model} knows its network: leave --patch-size, --depth and --pretrained out.")
    if config.arch and not is_file:
        raise ValueError("--arch is about a local file as --model: leave it out.")
    check_source(config.model)
    if config.arch:
        check_network_name(config.arch)
    check_batch(config.batch, config.run.accumulate)
    if config.ema:
        check_moving_average("--ema")


def load(config: Config, images: Labelled, precision: Chosen) -> Network:
    """What training begins with."""
    import torch

    from bigtrain.models.architecture import asked_for
    from bigtrain.models.load_network import load_network
    from bigtrain.models.sanity import check_sees
    from bigtrain.models.vit import ViT
    from bigtrain.training.trunk import check_training

    torch.manual_seed(config.seed)
    architecture = asked_for(config.model, config.arch, config.image_size, config.patch_size, config.depth)
    given = load_network(config.model, architecture, pretrained=config.pretrained, drop_path=config.drop_path)
    if config.pool == "both" and not isinstance(given.trunk, ViT):
        raise ValueError(f"--pool both is about a ViT's tokens, and {given.architecture.model} has none: leave it out.")
    check_sees(given, given.image_size or config.image_size or DEFAULT_SIZE)
    check_training(given.trunk, config.batch_norm, config.run)
    return given


def pretrain(config: Config, setup: Setup, images: Labelled, given: Network) -> Result:
    """Cross-entropy on random crops; leaves network.safetensors, and top-1 and top-5 of whole held-out images."""
    import torch
    import torch.nn.functional as F

    from bigtrain.data.views import RandomResizedCrop, Resized
    from bigtrain.evaluation.collect import top_k
    from bigtrain.models.classifier import Classifier
    from bigtrain.training import trunk
    from bigtrain.training.optim import adamw, decay_groups, scaled_lr, schedule, set_schedule
    from bigtrain.training.stage import Stage

    classes, train, fitted_N, held_out, held_out_N = images
    label_of, size = labels_of(classes), given.image_size or config.image_size or DEFAULT_SIZE
    parameters = sum(p.numel() for p in given.backbone.parameters()) / 1e6
    setup.announce(
        f"pretrain: {len(fitted_N)} images of {len(classes)} classes of {train.manifest.dataset}; "
        f"{given.architecture.model} with {parameters:.1f} M parameters at {size} pixels, {given.report}"
    )
    model = Classifier(given.trunk.requires_grad_(True), len(classes), config.pool)
    model = trunk.prepare_batch_norm(model, config.batch_norm)
    trunk.prepare_trunk(model.trunk, config.run, config.dropout)
    plan = trunk.without_padding(train.plan(fitted_N, config.batch, config.seed), model.trunk, config.batch_norm)
    lr = scaled_lr(config.lr, config.batch, config.lr_batch)
    groups = decay_groups(model.named_parameters(), base_lr=lr, layer_decay=config.layer_decay)
    stage = Stage(
        "pretrain", setup,
        trained=model.train(), optimizer=adamw(groups, setup.accelerator.device, lr=lr), clip=config.clip,
        state={"model": model}, ema=config.ema,
        stream=setup.stream(train, plan, RandomResizedCrop(size, config.crop_scale, config.mirror)),
        steps=config.epochs * plan.batches_per_epoch, flops_per_image=given.training_flops(size),
    )  # fmt: skip
    warmup = round(config.warmup_epochs * plan.batches_per_epoch)

    for step in stage:
        factor = schedule(config.schedule, stage.step, total=stage.steps, warmup=warmup)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.weight_decay)
        for part in step.parts():
            class_B = trunk.class_numbers(train, part, label_of)
            with setup.autocast():
                logits_BC = stage.module(given.normalise(part.views["image"]))
            loss_B = F.cross_entropy(
                logits_BC.float(), class_B, reduction="none", label_smoothing=config.label_smoothing
            )
            step.backward(setup.mean(part, loss_B))
        step.update(lr=factor * lr)

    model = trunk.with_batch_norm(stage.into(model))
    dtype = torch.float16 if config.weights == "fp16" else torch.float32
    model = model.to(dtype).float().eval()
    network = replace(given, trunk=model.trunk)
    if config.pool == "token":
        network = replace(network, heads={"classes": model.head}, classes={"classes": classes})
    setup.leave(LEAVES["pretrain"], network, dtype)
    stream = setup.in_order(held_out, held_out_N, Resized(size), config.batch)

    @torch.no_grad()
    def logits(image_B3HW: Tensor) -> Tensor:
        with setup.autocast():
            return model(given.normalise(image_B3HW))

    top1, top5, count = top_k(setup.accelerator, stream, logits, label_of)
    record = {"top1": top1, "top5": top5, "held_out_images": count, "classes": len(classes), "seed": config.seed}
    return Result(record, f"top-1 {top1:.3f}, top-5 {top5:.3f} on {count} held-out images", LEAVES["pretrain"])


main = partial(run_recipe, Recipe("pretrain", Config, __doc__ or "", check, read_labelled, load, pretrain, LEAVES))

if __name__ == "__main__":
    main()
