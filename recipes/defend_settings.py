"""The settings of recipes/defend.py: the paper's values, what is allowed, and what fits the networks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from bigtrain.choices import (
    HIGHEST_LR,
    Backend,
    Chosen,
    Distance,
    Keep,
    KeepOrAuto,
    Normalisation,
    Precision,
    Predict,
    Schedule,
    ScoreOver,
)
from bigtrain.data.protocol import Protocol, split
from bigtrain.data.shard_set import ShardSet
from bigtrain.models.timm_names import check_source, check_vit_name
from bigtrain.runtime.launch import check_batch, check_launch, zero_stage
from bigtrain.runtime.settings import Limits, RunSettings
from recipes.network_settings import Data

if TYPE_CHECKING:
    from bigtrain.models.vit import Architecture
    from bigtrain.models.weights import Pretrained


@dataclass(frozen=True)
class Config:
    train: str = ""
    """Shard set to train on; only its known images are read."""
    test: str = ""
    """Shard set to judge on."""
    known: tuple[str, ...] = ()
    """Known classes; an image with any object of them is known. All others are novel."""
    novel: tuple[str, ...] = ()
    """Or the novel classes; all others are known."""
    validation_share: float = 0.1
    """Share of the known training images that is held out, for the threshold."""
    train_limit: int = 0
    """Train on a seeded choice of so many known images; 0: all."""
    test_limit: int = 0
    """Judge on a seeded choice of so many test images; 0: all."""

    teacher: str = "vit_base_patch16_224.augreg_in21k"
    """A timm name, or a local .safetensors, .pth or AugReg .npz."""
    arch: str = ""
    """The timm vit_* that a local file's weights belong to; bigtrain's own files know theirs."""
    student: str = ""
    """The student's architecture, a timm vit_* as wide as the teacher; empty: the teacher's."""
    image_size: int = 224
    crop_size: int = 96

    tune: bool = True
    """Stage 1; without it (--no-tune) the teacher is distilled as it is."""
    distil: bool = True
    """Stage 2; without it (--no-distil) the run ends with the tuned teacher.safetensors, for others' --teacher."""
    tune_epochs: int = 3
    tune_batch: int = 64
    tuned_blocks: int = 2
    crops: int = 4
    crop_scale: tuple[float, float] = (0.1, 0.3)
    global_crops: int = 0
    """Further crops of scale .3-1 at the image's size; the authors' code has one."""
    prototypes: int = 0
    """K; 0: twice the number of classes that the training images show (4.3)."""
    temperature: float = 0.1
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    tune_lr: float = 1e-5
    """Of the tuned blocks."""
    head_lr: float = 1e-4
    """Of projection head and prototypes."""
    tune_decay: tuple[float, float] = (0.04, 0.5)
    layer_decay: float = 1.0
    """Of tuning: each block's learning rate is that of the one behind it times this."""
    ema_teacher: bool = False
    """Take the targets from a moving average of the network, as the authors' code can."""
    ema_momentum: float = 0.9995
    """At the start; it rises to 1 along a cosine."""
    queue: int = 0
    """Projected tokens of earlier batches that join Sinkhorn; 8192 in the authors' code."""

    distil_epochs: int = 10
    distil_steps: int = 0
    """Distil for so many steps instead of --distil-epochs, which are few on few pictures; 0: by epochs."""
    distil_batch: int = 64
    mask_ratio: float = 0.5
    keep: KeepOrAuto = "auto"
    """Which patches the student sees: those that the teacher attends to (guided, as the authors' code), the others
    (guided, as the paper's Fig. 2), or any. auto: attended, and random where hidden patches are to be predicted, which
    are scored by random halves."""
    predict: Predict = "visible"
    """Of which patches the student predicts the tokens: of those that it sees (the authors' code), of the hidden ones
    ("inferring the full context by only partially observing the input", 3.2), or of all. Where hidden ones are among
    them, they alone are scored."""
    decoder_blocks: int = 1
    """With --predict hidden or all: so many of the student's last blocks complete the hidden patches."""
    normalisation: Normalisation = "l2"
    normalise_student: bool = True
    """--no-normalise-student: teacher only, for the pixel level (4.6)."""
    distance: Distance = "squared"
    distilled_blocks: Literal[1, 3, 5] = 1
    distil_lr: float = 1e-5
    schedule: Schedule = "constant"
    warmup_epochs: float = 0.0
    distil_decay: float = 0.05
    drop_path: float = 0.1
    ema_student: float = 0.0
    """Momentum of a moving average of the student's weights, which becomes the student; 0: none."""

    clip: float = 0.0
    """Largest norm of the gradient, in both stages; 0: not clipped."""
    lr_batch: int = 0
    """The learning rates are meant for this global batch, and scaled to the given one; 0: not scaled."""
    score_pairs: int = 8
    """With --predict hidden or all: a patch's score is its mean over so many pairs of complementary halves, which are
    random whatever --mask-ratio and --keep are; the cost of scoring grows with them."""
    score_over: ScoreOver = "mean"
    """A picture's score: the mean of its patches' (3.3), their --score-quantile, or the mean over the half of them
    that the teacher attends to most. For pictures of many objects, which are known if any object is."""
    score_quantile: float = 0.25
    score_batch: int = 64
    """Images a forward pass of each process when scoring."""
    neighbours_bank: int = 10_000
    """At most so many known images serve the two nearest-neighbour figures."""
    seed: int = 0
    precision: Precision = "auto"
    attention: Backend = "auto"

    run: RunSettings = field(default_factory=RunSettings)


LIMITS: Limits = {
    "validation_share": (0, 0.9),
    **dict.fromkeys(("train_limit", "test_limit", "queue", "prototypes", "global_crops", "seed"), (0, math.inf)),
    **dict.fromkeys(("distil_steps",), (0, math.inf)),
    **dict.fromkeys(("decoder_blocks", "score_pairs"), (1, math.inf)),
    "score_quantile": (0.001, 0.999),
    **dict.fromkeys(("clip", "lr_batch"), (0, math.inf)),
    **dict.fromkeys(("image_size", "crop_size", "crops", "tune_epochs", "tune_batch", "tuned_blocks"), (1, math.inf)),
    **dict.fromkeys(("distil_epochs", "distil_batch", "score_batch", "neighbours_bank"), (1, math.inf)),
    **dict.fromkeys(("sinkhorn_iterations",), (1, math.inf)),
    **dict.fromkeys(("temperature", "epsilon"), (1e-4, math.inf)),
    **dict.fromkeys(("tune_lr", "head_lr", "distil_lr"), (0, HIGHEST_LR)),
    **dict.fromkeys(("distil_decay", "tune_decay", "warmup_epochs"), (0, math.inf)),
    **dict.fromkeys(("mask_ratio", "drop_path"), (0, 0.99)),
    **dict.fromkeys(("ema_momentum", "ema_student"), (0, 1)),
    "layer_decay": (1e-3, 1),
    "crop_scale": (0.001, 1),
}


def read_data(config: Config) -> Data:
    """The shard sets, what is known, and which images are for what."""
    train, test = ShardSet(config.train), ShardSet(config.test)
    classes = tuple(dict.fromkeys((*train.classes, *test.classes)))
    protocol = Protocol.of(classes, known=config.known, novel=config.novel)
    parts = split(
        protocol, train, test,
        validation_share=config.validation_share, seed=config.seed,
        train_limit=config.train_limit, test_limit=config.test_limit,
    )  # fmt: skip
    return Data(train, test, protocol, parts)


def check_settings(config: Config) -> None:
    """Refuse settings that contradict each other, or that this launch or timm cannot follow."""
    if not (config.tune or config.distil):
        raise ValueError("--no-tune and --no-distil leave nothing to do: give one of them.")
    if config.tune and config.prototypes == 1:
        raise ValueError("--prototypes is 1: with one prototype every patch agrees with every other; use 2 or more.")
    if config.predict != "visible" and config.mask_ratio == 0:
        raise ValueError(
            f"--predict {config.predict} with --mask-ratio 0 leaves nothing to predict: hide a share of the patches, "
            "such as 0.5, or take --predict visible."
        )
    if config.distil_steps and config.distil_epochs != Config.distil_epochs:
        raise ValueError("--distil-steps and --distil-epochs were both given: how long to distil is one of them.")
    if config.predict != "visible" and config.decoder_blocks < config.distilled_blocks:
        raise ValueError(
            f"--decoder-blocks is {config.decoder_blocks}, and the tokens of the last {config.distilled_blocks} blocks "
            f"are to be predicted at hidden patches: use {config.distilled_blocks} or more, or --distilled-blocks 1."
        )
    check_launch()
    if zero_stage() == 3 and (config.ema_teacher or config.ema_student):
        raise ValueError(
            "a moving average (--ema-teacher, --ema-student) needs whole weights, which ZeRO-3 shares out among the "
            "processes: launch with recipes/accelerate/zero2.yaml, or leave it out."
        )
    for global_batch in (config.tune_batch, config.distil_batch) if config.tune else (config.distil_batch,):
        check_batch(global_batch, config.run.accumulate)
    check_source(config.teacher, is_vit=True)
    for name in filter(None, (config.arch, config.student)):
        check_vit_name(name)


def check_networks(config: Config, given: Pretrained, precision: Chosen) -> None:
    """Refuse settings that do not fit the networks, before anything is written."""
    import torch

    from bigtrain.data.masks import visible_count
    from bigtrain.models.attention import resolve_backend, torch_dtype
    from bigtrain.models.vit import check_image_size, check_pair, masked_student
    from bigtrain.runtime.precision import device_type

    depth = len(given.vit.backbone.blocks)
    for side in (config.image_size, config.crop_size) if config.tune else (config.image_size,):
        check_image_size((side, side), given.vit.patch_size)
    if config.tune and config.tuned_blocks > depth:
        raise ValueError(
            f"--tuned-blocks is {config.tuned_blocks}, and the teacher has {depth} blocks: use 1 to {depth}."
        )
    if not given.vit.backbone.has_class_token:
        if kept(config) != "random" and config.mask_ratio > 0:
            raise ValueError("the teacher has no [CLS] token, whose attention guides the mask: use --keep random.")
        if config.score_over == "attended":
            raise ValueError("the teacher has no [CLS] token, whose attention chooses patches: use --score-over mean.")
    resolve_backend(config.attention, torch.device(device_type()), torch_dtype(precision))
    with torch.device("meta"):
        student = masked_student(student_architecture(config, given))
    check_pair(given.vit, student, config.distilled_blocks)
    if config.predict == "visible":
        return
    blocks, patches = len(student.backbone.blocks), math.prod(student.backbone.patch_embed.grid_size)
    if config.decoder_blocks > blocks:
        raise ValueError(
            f"--decoder-blocks is {config.decoder_blocks}, and the student has {blocks} blocks, the last of which "
            f"complete the hidden patches: use 1 to {blocks}."
        )
    if patches - visible_count(patches, config.mask_ratio) == 0 or patches < 2:
        raise ValueError(
            f"--mask-ratio {config.mask_ratio} hides none of the {patches} patches of a picture of {config.image_size} "
            f"pixels, and --predict {config.predict} needs some: hide more, or take --predict visible."
        )


def kept(config: Config) -> Keep:
    """Which patches the student sees, once "auto" is decided."""
    if config.keep == "auto":
        return "attended" if config.predict == "visible" else "random"
    return config.keep


def student_architecture(config: Config, given: Pretrained) -> Architecture:
    from bigtrain.models.vit import Architecture

    if config.student:
        return Architecture(config.student, config.image_size)
    return replace(given.architecture, image_size=config.image_size)
