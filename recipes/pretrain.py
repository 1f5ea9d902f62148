"""Supervised training of a network on labelled shards: the way to a teacher or trunk where none can be downloaded.

    accelerate launch recipes/pretrain.py --train data/reference/train --val data/reference/val --out runs/teacher

A ViT's teacher.safetensors serves as `--teacher` of recipes/defend.py, network.safetensors as `--network` of the other
recipes, with its classifier. After Steiner et al. 2021 (AugReg): random resized crops, mirroring, label smoothing,
AdamW, warm-up and cosine. The Finetune of Perera & Patel is row (a) of recipes/deep_novelty.py, by its own recipe.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.choices import HIGHEST_LR, BatchNorm, Precision, Schedule
from bigtrain.data.protocol import Protocol, in_validation
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.workers import prepare_workers
from bigtrain.models.timm_names import LOCAL, check_network_name, check_source
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.launch import check_batch, check_launch, zero_stage
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import Limits, RunSettings, check_ranges, print_if_asked, read_settings
from bigtrain.text import clock
from recipes.network_settings import check_single_labels, labels_of

if TYPE_CHECKING:  # what needs torch is imported where it is used, behind all mistakes that can be told without
    from bigtrain.data.stream import Stream
    from bigtrain.models.backbone import Network
    from bigtrain.models.heads import Classifier
    from recipes.run_setup import Setup

LEAVES = {"pretrain": "teacher.safetensors"}  # of a ViT
NETWORK = "network.safetensors"
DEFAULT_SIZE = 224


@dataclass(frozen=True)
class Config:
    train: str = ""
    """Shard set to train on; each image shows one class."""
    val: str = ""
    """Shard set to report top-1 and top-5 on; without it, a seeded share of train is held out."""
    validation_share: float = 0.05
    """Share of train that is held out where there is no --val."""

    known: tuple[str, ...] = ()
    """Train on these classes only; with neither this nor --novel on all."""
    novel: tuple[str, ...] = ()
    """Or on all but these."""

    model: str = "vit_small_patch16_224"
    """A timm network, or alexnet; or a local file, whose weights training begins with. The three settings below change
    the definition of a vit_* where they are not 0."""
    arch: str = ""
    """The network that a local file's weights belong to; bigtrain's own files know theirs."""
    pretrained: bool = False
    """Begin with timm's weights for that name."""
    image_size: int = 0
    patch_size: int = 0
    depth: int = 0
    pool: Literal["token", "both"] = "token"
    """What of a ViT is classified: the [CLS] token, or that and the mean of the patch tokens."""
    batch_norm: BatchNorm = "trained"
    """Of a network that has it: trained over the batches of all processes, or kept as it was."""

    epochs: int = 100
    batch: int = 256
    """Images a step, over all processes."""
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    drop_path: float = 0.1
    dropout: float = 0.5
    """At fc6 and fc7, which VGG and AlexNet have; other networks have no such layers."""
    label_smoothing: float = 0.1
    crop_scale: tuple[float, float] = (0.25, 1.0)
    mirror: bool = True
    """Mirror half of the training pictures; not for letters."""
    schedule: Schedule = "cosine"
    layer_decay: float = 1.0
    """Each block's learning rate is that of the one behind it times this."""
    lr_batch: int = 0
    """The learning rate is meant for this global batch, and scaled to the given one; 0: not scaled."""
    ema: float = 0.0
    """Momentum of a moving average of the weights, which becomes the teacher; 0: none."""
    clip: float = 1.0
    seed: int = 0
    precision: Precision = "auto"
    weights: Literal["fp32", "fp16"] = "fp32"
    """How the network is stored; the figures are of the weights as stored."""

    run: RunSettings = field(default_factory=RunSettings)


LIMITS: Limits = {
    "validation_share": (0, 0.9),
    **dict.fromkeys(("image_size", "patch_size", "depth", "seed"), (0, math.inf)),
    **dict.fromkeys(("epochs", "batch"), (1, math.inf)),
    "lr": (0, HIGHEST_LR),
    **dict.fromkeys(("weight_decay", "warmup_epochs", "clip", "lr_batch"), (0, math.inf)),
    "ema": (0, 1),
    "layer_decay": (1e-3, 1),
    **dict.fromkeys(("drop_path", "dropout", "label_smoothing"), (0, 0.99)),
    "crop_scale": (0.001, 1),
}


def main(argv: list[str] | None = None) -> None:
    with user_errors("pretrain.py"):
        argv = sys.argv[1:] if argv is None else argv
        config = read_settings(Config, argv, description=__doc__)
        check_ranges(config, LIMITS)
        print_if_asked(config, argv)
        if not config.train or not config.run.out:
            raise ValueError("--train SHARDS and --out FOLDER are needed: what to train on, and where the run goes.")
        run = RunFolder(config.run.out, config)
        if run.is_already_finished():
            return
        images = read_images(config)
        check_settings(config)
        pretrain(config, run, images)


class Images(NamedTuple):
    """The classes to learn, the images to learn them from, and those to report top-1 and top-5 on."""

    classes: tuple[str, ...]
    train: ShardSet
    fitted_N: NDArray[np.int64]
    held_out: ShardSet
    held_out_N: NDArray[np.int64]


def read_images(config: Config) -> Images:
    """The shard sets, and which of their images are for what."""
    train = ShardSet(config.train)
    classes, fitted_N = chosen(config, train)
    held_out, held_out_N = train, fitted_N
    if config.val:
        held_out = ShardSet(config.val)
        if unknown := sorted(set(held_out.classes) - set(train.classes)):
            raise ValueError(f"--val has classes that --train lacks: {', '.join(unknown[:10])}.")
        held_out_N = np.flatnonzero(held_out.shows_any(classes))
    else:
        keys = [train.key(sample) for sample in fitted_N.tolist()]
        is_held_out = in_validation(keys, share=config.validation_share, seed=config.seed)
        fitted_N, held_out_N = fitted_N[~is_held_out], fitted_N[is_held_out]
    if len(held_out_N) == 0:
        raise ValueError("nothing is held out to report top-1 on: give --val SHARDS, or a greater --validation-share.")
    for shard_set, sample_N in ((train, fitted_N), (held_out, held_out_N)):
        check_single_labels(shard_set, sample_N, classes)
    return Images(classes, train, fitted_N, held_out, held_out_N)


def check_settings(config: Config) -> None:
    """Refuse settings that contradict each other, or that this launch or timm cannot follow."""
    is_file = Path(config.model).suffix in LOCAL
    if is_file and (config.patch_size or config.depth or config.pretrained):
        raise ValueError(f"{config.model} knows its network: leave --patch-size, --depth and --pretrained out.")
    if config.arch and not is_file:
        raise ValueError("--arch is about a local file as --model: leave it out.")
    check_source(config.model)
    if config.arch:
        check_network_name(config.arch)
    check_batch(config.batch, config.run.accumulate)
    check_launch()
    if config.ema and zero_stage() == 3:
        raise ValueError("--ema needs whole weights, which ZeRO-3 shares out: launch with zero2.yaml, or leave it out.")


def pretrain(config: Config, run: RunFolder, images: Images) -> None:
    prepare_workers(config.run.workers)
    import torch
    import torch.nn.functional as F
    from torch import nn

    from bigtrain.data.pictures import jpeg_decoder
    from bigtrain.data.views import RandomResizedCrop, Resized, to_float
    from bigtrain.models.backbone import network_flops, save_network
    from bigtrain.models.flops import trained_flops
    from bigtrain.models.heads import Classifier
    from bigtrain.models.vit import VisionTransformer, ViT
    from bigtrain.models.weights import save_vit
    from bigtrain.runtime.optim import adamw, decay_groups, follow, scaled_lr, schedule, set_schedule
    from bigtrain.runtime.precision import choose_precision
    from recipes.run_setup import Setup
    from recipes.trunk import (
        check_picture_size,
        check_training,
        class_numbers,
        prepare_batch_norm,
        set_dropout,
        set_recompute,
        with_batch_norm,
        without_padding,
    )

    classes, train, fitted_N, held_out, held_out_N = images
    label_of = labels_of(classes)

    torch.manual_seed(config.seed)
    given = first_weights(config)
    architecture, trunk = given.architecture, given.trunk
    size, flops = config.image_size or DEFAULT_SIZE, 0
    if isinstance(trunk, VisionTransformer):
        size, trunk = trunk.patch_embed.img_size[0], ViT(trunk)
        flops = trained_flops(trunk.requires_grad_(True), size)
    elif config.pool == "both":
        raise ValueError(f"--pool both is about a ViT's tokens, and {architecture.model} has none: leave it out.")
    check_picture_size(given, size)
    model = Classifier(trunk.requires_grad_(True), len(classes), config.pool)
    check_training(model.trunk, config.batch_norm, config.run)
    model = prepare_batch_norm(model, config.batch_norm)
    precision = run.resolved("precision") or choose_precision(config.precision)
    set_recompute(model.trunk, config.run)
    set_dropout(model.trunk, config.dropout)

    from recipes.stage import Stage  # imports Accelerate, as Setup.begin does

    setup = Setup.begin(run, precision, LEAVES)
    accelerator = setup.accelerator
    parameters = sum(p.numel() for p in trunk.parameters())
    accelerator.print(
        f"pretrain: {len(fitted_N)} images of {len(classes)} classes of {train.manifest.dataset}; {architecture.model} "
        f"with {parameters / 1e6:.1f} M parameters at {size} pixels, {given.report}; {accelerator.num_processes} "
        f"process(es) on {accelerator.device.type}, precision {precision}, JPEGs by {jpeg_decoder()}"
    )
    began = time.monotonic()
    plan = without_padding(train.plan(fitted_N, config.batch, config.seed), trunk, config.batch_norm)
    lr = scaled_lr(config.lr, config.batch, config.lr_batch)
    groups = decay_groups(model.named_parameters(), base_lr=lr, layer_decay=config.layer_decay)
    state, ema = nn.ModuleDict({"model": model.train()}), copy.deepcopy(model).requires_grad_(False)
    if config.ema:
        state["ema"] = ema
    stage = Stage(
        "pretrain",
        setup,
        trained=model,
        optimizer=adamw(groups, accelerator.device, lr=lr),
        state=state,
        clip=config.clip,
        stream=setup.stream(train, plan, RandomResizedCrop(size, config.crop_scale, config.mirror)),
        steps=config.epochs * plan.batches_per_epoch,
        flops_per_image=flops or 3 * network_flops(trunk, size),
    )
    warmup = round(config.warmup_epochs * plan.batches_per_epoch)

    for batch in stage.batches():
        factor = schedule(config.schedule, stage.step, total=stage.steps, warmup=warmup)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.weight_decay)
        for part in stage.parts(batch):
            class_B = class_numbers(train, part, label_of)
            with setup.autocast():
                logits_BC = stage.module(to_float(part.views["image"], given.mean, given.std))
            loss_B = F.cross_entropy(
                logits_BC.float(), class_B, reduction="none", label_smoothing=config.label_smoothing
            )
            stage.backward(part.mean(loss_B, accelerator.num_processes))
        if stage.update() and config.ema:
            follow(ema, model, config.ema)
        stage.advance(batch, lr=factor * lr)

    model = with_batch_norm(ema if config.ema else stage.into(model))
    dtype = torch.float16 if config.weights == "fp16" else torch.float32
    model = model.to(dtype).float().eval()
    bare, left = model.trunk, run / NETWORK
    if isinstance(model.trunk, ViT):
        bare, left = model.trunk.backbone, run / LEAVES["pretrain"]
        if accelerator.is_main_process:
            save_vit(left, model.trunk, architecture, mean=given.mean, std=given.std, dtype=dtype)
    if config.pool == "token" and accelerator.is_main_process:
        heads, names = {"classes": model.head}, {"classes": classes}
        save_network(run / NETWORK, replace(given, trunk=bare, heads=heads, classes=names), dtype)
    stream = setup.in_order(held_out, held_out_N, Resized(size), config.batch)
    top1, top5, count = accuracy(setup, model, stream, label_of, given)
    if accelerator.is_main_process:
        results = {"top1": top1, "top5": top5, "held_out_images": count, "classes": len(label_of), "seed": config.seed}
        run.finish(results)
    setup.end_trackers()
    accelerator.print(
        f"top-1 {top1:.3f}, top-5 {top5:.3f} on {count} held-out images; this start took "
        f"{clock(time.monotonic() - began)}; "
        f"the network is {left}"
    )


def chosen(config: Config, train: ShardSet) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The classes to learn, and the images to learn them from."""
    if not (config.known or config.novel):
        return train.classes, np.arange(len(train))
    protocol = Protocol.of(train.classes, known=config.known, novel=config.novel)
    return protocol.known, np.flatnonzero(protocol.is_known(train))


def first_weights(config: Config) -> Network:
    """What training begins with."""
    from bigtrain.models.backbone import load_network
    from bigtrain.models.vit import Architecture

    if Path(config.model).suffix in LOCAL:
        architecture = Architecture(config.arch, config.image_size) if config.arch else None
        return load_network(config.model, architecture, drop_path=config.drop_path)
    architecture = Architecture(config.model, config.image_size, config.patch_size, config.depth)
    return load_network(config.model, architecture, pretrained=config.pretrained, drop_path=config.drop_path)


def accuracy(
    setup: Setup, model: Classifier, stream: Stream, label_of: dict[str, int], given: Network
) -> tuple[float, float, int]:
    """Top-1, top-5 and the number of images judged: whole pictures, each once over all ranks."""
    import torch

    from bigtrain.data.views import to_float
    from recipes.trunk import class_numbers

    accelerator = setup.accelerator
    hits = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for batch in stream.batches():
        batch = batch.to(accelerator.device)
        class_B = class_numbers(stream.shard_set, batch, label_of)
        with torch.no_grad(), setup.autocast():
            logits_BC = model(to_float(batch.views["image"], given.mean, given.std))
        hit_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices == class_B[:, None]
        hit_B5 = hit_B5 & (batch.weight_B > 0)[:, None]
        hits += torch.stack([hit_B5[:, 0].sum(), hit_B5.sum(), batch.weight_B.sum()]).double()
    top1, top5, count = accelerator.reduce(hits, reduction="sum").tolist()
    if accelerator.num_processes > 1:
        stream.budget.agree(0, len(stream.plan.sample_N) - int(count))
    return top1 / count, top5 / count, int(count)


if __name__ == "__main__":
    main()
