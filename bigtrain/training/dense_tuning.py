"""Dense tuning, DEFEND's first stage (Salehi et al., 3.1), for the two recipes that do it: defend.py and tune.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from typing import Protocol as Interface

from bigtrain.choices import HIGHEST_LR, setting

if TYPE_CHECKING:  # what needs torch is imported where it is used
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from bigtrain.data.shard_set import ShardSet
    from bigtrain.data.stream import Batch
    from bigtrain.methods.defend.network import DenseTuner
    from bigtrain.models.network import Network
    from bigtrain.models.vit import Packed
    from bigtrain.training.run_setup import Setup

STAGE = "tune"


@dataclass(frozen=True)
class DenseTuningMixin:
    image_size: int = setting(224, 1)
    crop_size: int = setting(96, 1)
    tune_epochs: int = setting(3, 1)
    tune_batch: int = setting(64, 1)
    tuned_blocks: int = setting(2, 1)
    crops: int = setting(4, 1)
    crop_scale: tuple[float, float] = setting((0.1, 0.3), 0.001, 1)
    crop_from: Literal["picture", "view"] = "picture"
    """What crops are cut from: the original picture, which is decoded in each epoch; or, on the device, the picture as
    it was resized to --image-size, which is decoded once and less sharp."""
    global_crops: int = setting(0, 0)  # Further crops of scale .3-1 at the image's size; the authors' code has one.
    prototypes: int = setting(0, 0)  # K; 0: twice the number of classes that the training images show (4.3).
    temperature: float = setting(0.1, 1e-4)
    epsilon: float = setting(0.05, 1e-4)
    sinkhorn_iterations: int = setting(3, 1)
    tune_lr: float = setting(1e-5, 0, HIGHEST_LR)  # Of the tuned blocks.
    head_lr: float = setting(1e-4, 0, HIGHEST_LR)  # Of projection head and prototypes.
    tune_decay: tuple[float, float] = setting((0.04, 0.5), 0)
    layer_decay: float = setting(1.0, 1e-3, 1)
    """Of tuning: each block's learning rate is that of the block after it times this."""
    ema_teacher: bool = False  # Take the targets from a moving average of the network, as the authors' code can.
    ema_momentum: float = setting(0.9995, 0, 1)  # At the start; it rises to 1 along a cosine.
    queue: int = setting(0, 0)  # Projected tokens of earlier batches that join Sinkhorn; 8192 in the authors' code.


@dataclass(frozen=True)
class GuardMixin:
    guard_images: int = setting(512, 8)  # Held-out images that the features are looked at on.
    guard_every: int = setting(0, 0)  # Look every so many steps; 0: ten times in a run.
    guard_fall: float = setting(0.05, 0, 1)
    """Stop, and keep the best state, when the share of pictures that find their other view, or that nearest neighbours
    classify rightly, falls by more than this, or the rank of the features by half."""
    validation_share: float = setting(0.05, 0.001, 0.9)  # Share of the images that is held out; of small sets more.


class Watch(Interface):
    """What looks at a network while it is tuned: training/tuning_guard.py."""

    def begin(self, step: int) -> None:
        """Before the first step, or the step that is resumed."""

    def __call__(self, step: int, steps: int, tuned: Callable[[], DenseTuner]) -> bool:
        """After a step of so many; False ends the tuning. `tuned` gives the tuner as it is, on all ranks."""
        ...


def dense_tuning(
    config: Any,
    setup: Setup,
    train: ShardSet,
    fitted_N: NDArray[np.int64],
    given: Network,
    *,
    prototypes: int,
    leaves: str,
    lora_rank: int = 0,
    guard: Watch | None = None,
) -> Network:
    """Patches of one object come to agree; what comes of it is left in the run folder, and ends the stage.

    Args:
        config: with DenseTuningMixin, OptimMixin and RunMixin.
        fitted_N: the images of `train` to tune on; their labels are not looked at.
        given: the network; it stays as it is.
        prototypes: K.
        leaves: the name of the file.
        lora_rank: tune low-rank updates of the blocks (Hu et al. 2022), merged at the end; 0: the blocks.
        guard: looks at the tuner now and then, and ends a tuning that does harm.
    """
    import torch

    from bigtrain.data.views import MultiCrop, Resized
    from bigtrain.methods.defend.cluster_map import cluster_map
    from bigtrain.methods.defend.device_crops import DeviceCrops
    from bigtrain.methods.defend.equations import multi_crop_loss
    from bigtrain.methods.defend.network import DenseTuner, TokenQueue, unit_rows
    from bigtrain.models.flops import trained_flops, vit_forward_flops
    from bigtrain.models.lora import add_low_rank, merge_low_rank
    from bigtrain.training.optim import adamw, cosine, decay_groups, scaled_lr, set_schedule
    from bigtrain.training.stage import Stage

    def new_tuner() -> DenseTuner:
        torch.manual_seed(config.seed)
        tuner = DenseTuner(copy.deepcopy(given.vit), prototypes, config.tuned_blocks)
        if lora_rank:
            add_low_rank(tuner.vit.backbone.blocks[-config.tuned_blocks :], lora_rank)
        tuner.vit.recompute = config.run.recompute
        return tuner

    tuner, queue = new_tuner(), TokenQueue(config.queue)
    ema = new_tuner().requires_grad_(False) if config.ema_teacher else tuner
    state = {"tuner": tuner, "queue": queue} | ({"ema": ema} if config.ema_teacher else {})
    lr, head_lr = (scaled_lr(lr, config.tune_batch, config.lr_batch) for lr in (config.tune_lr, config.head_lr))
    groups = decay_groups(tuner.vit.named_parameters(), base_lr=lr, layer_decay=config.layer_decay)
    groups += decay_groups([*tuner.head.named_parameters(), *tuner.prototypes.named_parameters()], base_lr=head_lr)
    sizes = [config.crop_size] * config.crops + [config.image_size] * config.global_crops
    flops = vit_forward_flops(tuner.vit, config.image_size) + sum(trained_flops(tuner.vit, size) for size in sizes)
    views = MultiCrop(config.image_size, config.crop_size, config.crops, config.crop_scale, config.global_crops)
    on_device = DeviceCrops(views) if config.crop_from == "view" else None
    plan = train.plan(fitted_N, config.tune_batch, config.seed)
    steps = config.tune_epochs * plan.batches_per_epoch
    stream = setup.stream(train, plan, Resized(config.image_size) if on_device else views, steps=steps)
    stage = Stage(
        STAGE, setup,
        trained=tuner, optimizer=adamw(groups, setup.accelerator.device, lr=head_lr), state=state, clip=config.clip,
        stream=stream, steps=steps, flops_per_image=flops,
    )  # fmt: skip
    source, patch = ema if config.ema_teacher else stage.module, given.vit.patch_size

    @torch.no_grad()
    def frozen(part: Batch) -> tuple[Packed, list[Tensor], list[Tensor]]:
        """A part's images and crops behind the blocks that do not learn; the crops and their boxes. They are held for
        all parts of a step, but without a graph."""
        image_B3HW = part.views["image"]
        crops, boxes = on_device.crops_of(image_B3HW, part.seed_B) if on_device else views.crops_of(part.views)
        pictures = [image_B3HW, *(crop_BV3HW.flatten(0, 1) for crop_BV3HW in crops)]
        with setup.autocast():
            return stage.module(*map(given.normalise, pictures), frozen=True), crops, boxes

    def tuned() -> DenseTuner:
        """The tuner as it is now, an ordinary module; called on all ranks."""
        with torch.random.fork_rng():
            now = stage.into(new_tuner())
        merge_low_rank(now)
        return now

    if guard:
        guard.begin(stage.step)
    for step in stage:
        factor = cosine(stage.step, total=stage.steps, start=1.0, end=0.0)
        decay = cosine(stage.step, total=stage.steps, start=config.tune_decay[0], end=config.tune_decay[1])
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=decay)
        begun = [frozen(step.batch.part(number, config.run.accumulate)) for number in range(config.run.accumulate)]
        q_BhwK = cluster_map(
            source, queue, [seen.only(slice(0, 1)) for seen, *_ in begun], step.batch.weight_B, setup.accelerator,
            setup.autocast(), epsilon=config.epsilon, iterations=config.sinkhorn_iterations,
        )  # fmt: skip
        for part, (seen, crops, boxes), q_bhwK in zip(
            step.parts(), begun, q_BhwK.chunk(config.run.accumulate), strict=True
        ):
            with setup.autocast():
                _, cosines = stage.module(seen.only(slice(1, None)))  # z' p
            loss_B = multi_crop_loss(cosines, q_bhwK, crops, boxes, patch_size=patch, temperature=config.temperature)
            step.backward(setup.mean(part, loss_B))
        step.update(lr=factor * lr)
        stage.constrain(tuner, "prototypes.weight_KD", unit_rows)
        if config.ema_teacher:
            stage.follow(ema, tuner, cosine(stage.step, total=stage.steps, start=config.ema_momentum, end=1.0))
            stage.constrain(ema, "prototypes.weight_KD", unit_rows)
        if guard and not guard(stage.step + 1, stage.steps, tuned):
            stage.end("the guard has stopped it")
            break

    return setup.leave(leaves, replace(given, trunk=tuned().vit))
