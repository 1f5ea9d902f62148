"""Supervised training of a ViT on labelled shards: the way to a teacher where none can be downloaded.

    accelerate launch recipes/pretrain.py --train data/reference/train --val data/reference/val --out runs/teacher

Its teacher.safetensors serves as `--teacher` of recipes/defend.py. After Steiner et al. 2021 (AugReg): random resized
crops, mirroring, label smoothing, AdamW, warm-up and cosine.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.data.pictures import jpeg_decoder
from bigtrain.data.plan import PADDING
from bigtrain.data.protocol import in_validation
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Batch, Stream
from bigtrain.data.views import RandomResizedCrop, Resized, to_float
from bigtrain.data.workers import prepare_workers
from bigtrain.models.flops import trained_flops
from bigtrain.models.heads import Classifier
from bigtrain.models.vit import Architecture, ViT
from bigtrain.models.weights import AUGREG_MEAN as MEAN
from bigtrain.models.weights import AUGREG_STD as STD
from bigtrain.models.weights import save_vit
from bigtrain.runtime import zero
from bigtrain.runtime.config import Limits, RunSettings, check_ranges, print_if_asked, read_settings, user_errors
from bigtrain.runtime.launch import check_launch
from bigtrain.runtime.optim import HIGHEST_LR, decay_groups, follow, scaled_lr, schedule, set_schedule
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.start import Precision, choose_precision
from bigtrain.runtime.watch import clock
from recipes.run_setup import Setup, already_finished, check_batch
from recipes.stage import Stage

LEAVES = {"pretrain": "teacher.safetensors"}


@dataclass(frozen=True)
class Config:
    train: str = ""
    """Shard set to train on; each image shows one class."""
    val: str = ""
    """Shard set to report top-1 and top-5 on; without it, a seeded share of train is held out."""
    validation_share: float = 0.05
    """Share of train that is held out where there is no --val."""

    model: str = "vit_small_patch16_224"
    """A timm vit_*; the three settings below change its definition where they are not 0."""
    image_size: int = 0
    patch_size: int = 0
    depth: int = 0
    pool: Literal["token", "both"] = "token"
    """What is classified: the [CLS] token, or that and the mean of the patch tokens."""

    epochs: int = 100
    batch: int = 256
    """Images a step, over all processes."""
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    crop_scale: tuple[float, float] = (0.25, 1.0)
    schedule: Literal["constant", "cosine"] = "cosine"
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
    """How teacher.safetensors is stored; the figures are of the weights as stored."""

    run: RunSettings = field(default_factory=RunSettings)


LIMITS: Limits = {
    "validation_share": (0, 0.9),
    **dict.fromkeys(("image_size", "patch_size", "depth", "seed"), (0, math.inf)),
    **dict.fromkeys(("epochs", "batch"), (1, math.inf)),
    "lr": (0, HIGHEST_LR),
    **dict.fromkeys(("weight_decay", "warmup_epochs", "clip", "lr_batch"), (0, math.inf)),
    "ema": (0, 1),
    "layer_decay": (1e-3, 1),
    **dict.fromkeys(("drop_path", "label_smoothing"), (0, 0.99)),
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
        if not already_finished(run):
            pretrain(config, run)


def pretrain(config: Config, run: RunFolder) -> None:
    prepare_workers(config.run.workers, "recipes.pretrain")
    train = ShardSet(config.train)
    fitted_N = np.arange(len(train))
    held_out, held_out_N = train, fitted_N
    if config.val:
        held_out = ShardSet(config.val)
        held_out_N = np.arange(len(held_out))
    else:
        is_held_out = in_validation(train.keys(), share=config.validation_share, seed=config.seed)
        fitted_N, held_out_N = fitted_N[~is_held_out], fitted_N[is_held_out]
    if unknown := sorted(set(held_out.classes) - set(train.classes)):
        raise ValueError(f"--val has classes that --train lacks: {', '.join(unknown[:10])}.")
    if len(held_out_N) == 0:
        raise ValueError("nothing is held out to report top-1 on: give --val SHARDS, or a greater --validation-share.")
    for shard_set in (train, held_out):
        shard_set.check_single_objects()
    label_of = {name: number for number, name in enumerate(train.classes)}

    architecture = Architecture(config.model, config.image_size, config.patch_size, config.depth)
    torch.manual_seed(config.seed)
    vit = ViT(architecture.build(drop_path=config.drop_path))
    size = vit.backbone.patch_embed.img_size[0]
    model = Classifier(vit, len(train.classes), config.pool)
    check_batch(config.batch, config.run)
    check_launch()
    if config.ema and zero.stage_asked_for() == 3:
        raise ValueError("--ema needs whole weights, which ZeRO-3 shares out: launch with zero2.yaml, or leave it out.")
    precision = run.resolved("precision") or choose_precision(config.precision, vit.width)
    setup = Setup.begin(run, precision, LEAVES)
    accelerator = setup.accelerator
    parameters = sum(p.numel() for p in vit.parameters())
    accelerator.print(
        f"pretrain: {len(fitted_N)} images of {len(train.classes)} classes of {train.manifest.dataset}; {config.model} "
        f"with {parameters / 1e6:.1f} M parameters at {size} pixels; {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, precision {precision}, JPEGs by {jpeg_decoder()}"
    )
    began = time.monotonic()
    plan = train.plan(fitted_N, config.batch, config.seed)
    lr = scaled_lr(config.lr, config.batch, config.lr_batch)
    groups = decay_groups(model.named_parameters(), base_lr=lr, layer_decay=config.layer_decay)
    state, ema = nn.ModuleDict({"model": model.train()}), copy.deepcopy(model).requires_grad_(False)
    if config.ema:
        state["ema"] = ema
    vit.recompute = config.run.recompute
    stage = Stage(
        "pretrain",
        setup,
        trained=model,
        optimizer=torch.optim.AdamW(groups, lr=lr),
        state=state,
        clip=config.clip,
        stream=setup.stream(train, plan, RandomResizedCrop(size, config.crop_scale)),
        epochs=config.epochs,
        flops_per_image=trained_flops(vit, size),
    )
    warmup = round(config.warmup_epochs * plan.batches_per_epoch)

    for batch in stage.batches():
        factor = schedule(config.schedule, stage.step, total=stage.steps, warmup=warmup)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.weight_decay)
        for part in stage.parts(batch):
            class_B = classes(train, part, label_of)
            with setup.autocast():
                logits_BC = stage.module(to_float(part.views["image"], MEAN, STD))
            loss_B = F.cross_entropy(
                logits_BC.float(), class_B, reduction="none", label_smoothing=config.label_smoothing
            )
            stage.backward(part.mean(loss_B, accelerator.num_processes))
        if stage.update() and config.ema:
            follow(ema, model, config.ema)
        stage.advance(batch, lr=factor * lr)

    fresh = Classifier(ViT(architecture.build()), len(train.classes), config.pool)
    model = ema if config.ema else stage.into(fresh)
    dtype = torch.float16 if config.weights == "fp16" else torch.float32
    vit = model.vit.to(dtype).float()
    stream = setup.in_order(held_out, held_out_N, Resized(size), config.batch)
    if accelerator.is_main_process:
        save_vit(run / "teacher.safetensors", vit, architecture, mean=MEAN, std=STD, dtype=dtype)
    top1, top5, count = accuracy(setup, model.eval(), stream, label_of)
    if accelerator.is_main_process:
        results = {"top1": top1, "top5": top5, "held_out_images": count, "classes": len(label_of), "seed": config.seed}
        run.finish(results)
    setup.end_trackers()
    accelerator.print(
        f"top-1 {top1:.3f}, top-5 {top5:.3f} on {count} held-out images; this start took "
        f"{clock(time.monotonic() - began)}; "
        f"the teacher is {run / 'teacher.safetensors'}"
    )


@torch.no_grad()
def accuracy(setup: Setup, model: Classifier, stream: Stream, label_of: dict[str, int]) -> tuple[float, float, int]:
    """Top-1, top-5 and the number of images judged: whole pictures, each once over all ranks."""
    accelerator = setup.accelerator
    hits = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for batch in stream.batches():
        batch = batch.to(accelerator.device)
        class_B = classes(stream.shard_set, batch, label_of)
        with setup.autocast():
            logits_BC = model(to_float(batch.views["image"], MEAN, STD))
        hit_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices == class_B[:, None]
        hit_B5 = hit_B5 & (batch.weight_B > 0)[:, None]
        hits += torch.stack([hit_B5[:, 0].sum(), hit_B5.sum(), batch.weight_B.sum()]).double()
    top1, top5, count = accelerator.reduce(hits, reduction="sum").tolist()
    if accelerator.num_processes > 1:
        stream.budget.agree(0, len(stream.plan.sample_N) - int(count))
    return top1 / count, top5 / count, int(count)


def classes(shard_set: ShardSet, batch: Batch, label_of: dict[str, int]) -> Tensor:
    """The class of each image of a batch; 0 in the places of padding, which weigh nothing."""
    labels = [0 if s == PADDING else label_of[shard_set.only_class_of(s)] for s in batch.sample_B.tolist()]
    return torch.tensor(labels).to(batch.weight_B.device, non_blocking=True)


if __name__ == "__main__":
    main()
