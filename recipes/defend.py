"""DEFEND: Salehi et al., "Redefining Normal: A Novel Object-Level Approach for Multi-Object Novelty Detection".

    accelerate launch recipes/defend.py              # the preset: embedded Fashion-MNIST, offline
    accelerate launch recipes/defend.py --train data/train --test data/test --known dog --out runs/dog

Stage 1 (3.1) tunes the teacher's last blocks so that patches of one object agree; stage 2 (3.2) distils it into a
student that sees half of the patches; novelty (3.3) is their disagreement. The defaults are the paper's values and,
where it is silent or may be read in two ways, the authors' code's.

What the student predicts. The paper's student infers "the full context by only partially observing the input"; the
authors' code takes the loss on the visible patches, the default here (--predict visible). Such a student can copy what
it sees: it explains novel pictures as well as known ones. With --predict hidden or all, each patch is scored by halves
of the picture that hide it. A student that ignores the picture is scored beside every figure: only above it has
anything been learnt. Which half it sees. The code shows the patches that the teacher attends to (--keep attended), the
paper's Fig. 2 hides them (--keep unattended). Aims at tables 1 to 5: slurm/sweeps/defend_table1_cifar10.toml and on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from bigtrain import choices
from bigtrain.choices import setting
from bigtrain.data.protocol import Split
from bigtrain.methods.defend.checks import check_networks, check_settings, kept, student_architecture
from bigtrain.runtime.launch import check_batch, check_moving_average
from bigtrain.training.dense_tuning import DenseTuningMixin, dense_tuning
from bigtrain.training.mixins import DataMixin, JudgeMixin, OptimMixin, RunMixin, WeightsMixin, check_pixels
from bigtrain.training.read_split import read_split
from bigtrain.training.run import Recipe, Result, run_recipe
from recipes.presets.fashion.prepare import build_embedded_shards, is_embedded, with_preset

if TYPE_CHECKING:  # what needs torch is imported where it is used
    from bigtrain.models.network import Network
    from bigtrain.training.run_setup import Setup

LEAVES = {"tune": "teacher.safetensors", "distil": "student.safetensors"}  # stage -> file, in their order


@dataclass(frozen=True)
class Config(RunMixin, JudgeMixin, OptimMixin, DenseTuningMixin, WeightsMixin, DataMixin):
    teacher: str = "vit_base_patch16_224.augreg_in21k"
    """A ViT: a timm name, an hf-hub:ORG/NAME, a local file of weights, or a folder in the form of Hugging Face."""
    arch: str = ""  # The timm name that a local file's weights belong to; our own files and folders record theirs.
    pretrained: bool = True  # --no-pretrained: a name's teacher with random weights.
    student: str = ""
    """The student's architecture, a ViT of timm with the teacher's patches; empty: the teacher's. Tokens of one that is
    not as wide as the teacher are compared through a linear layer."""
    attention: choices.Backend = "auto"
    tune: bool = True  # Stage 1; without it (--no-tune) the teacher is distilled as it is.
    distil: bool = True
    """Stage 2; without it (--no-distil) the run ends with the tuned teacher.safetensors, for other runs' --teacher."""
    distil_epochs: int = setting(10, 1)
    distil_steps: int = setting(0, 0)  # Distil for this many steps instead of --distil-epochs; 0: by epochs.
    distil_batch: int = setting(64, 1)
    mask_ratio: float = setting(0.5, 0, 0.99)
    keep: choices.KeepOrAuto = "auto"
    """Which patches the student sees: those that the teacher attends to (the code), the others (Fig. 2), or any. auto:
    attended, or random where hidden patches are predicted, which are scored by random halves."""
    predict: choices.Predict = "visible"
    """Of which patches the student predicts the tokens: of those that it sees (the authors' code), of the hidden ones
    (3.2, to the letter), or of all. Where hidden ones are among them, they alone are scored."""
    decoder_blocks: int = setting(1, 1)
    """With --predict hidden or all: how many of the student's last blocks complete the hidden patches."""
    normalisation: choices.Normalisation = "l2"
    normalise_student: bool = True  # --no-normalise-student: teacher only, for the pixel level (4.6).
    distance: choices.Distance = "squared"
    distilled_blocks: Literal[1, 3, 5] = 1
    distil_lr: float = setting(1e-5, 0, choices.HIGHEST_LR)
    schedule: choices.Schedule = "constant"
    warmup_epochs: float = setting(0.0, 0)
    distil_decay: float = setting(0.05, 0)
    drop_path: float = setting(0.1, 0, 0.99)
    ema_student: float = setting(0.0, 0, 1)
    """Momentum of a moving average of the student's weights, which becomes the student; 0: none."""
    score_pairs: int = setting(8, 1)
    """With --predict hidden or all: a patch's score is its mean over this many pairs of random complementary halves."""
    score_over: choices.ScoreOver = "mean"
    """A picture's score: the mean of its patches' (3.3) or, for pictures of many objects, their --score-quantile, or
    the mean over the half of them that the teacher attends to most."""
    score_quantile: float = setting(0.25, 0.001, 0.999)


def check(config: Config) -> None:
    check_settings(config)
    check_pixels(config)
    if config.ema_teacher or config.ema_student:
        check_moving_average("--ema-teacher, --ema-student")
    for global_batch in (config.tune_batch, config.distil_batch) if config.tune else (config.distil_batch,):
        check_batch(global_batch, config.run.accumulate)


def read(config: Config) -> Split:
    if is_embedded(config):
        build_embedded_shards()
    return read_split(config)


def load(config: Config, split: Split, precision: choices.Chosen) -> Network:
    import torch

    from bigtrain.models.architecture import Architecture
    from bigtrain.models.load_network import load_network
    from bigtrain.runtime.precision import device_type

    torch.manual_seed(config.seed)  # of --no-pretrained
    architecture = Architecture(config.arch) if config.arch else None
    given = load_network(
        config.teacher,
        architecture,
        pretrained=config.pretrained,
        needs_vit=True,
        weights_key=config.weights_key,
        image_size=config.image_size,
        mean=config.mean,
        std=config.std,
        attention=config.attention,
    )
    check_networks(config, given, precision, device_type())
    return given


def defend(config: Config, setup: Setup, split: Split, given: Network) -> Result:
    """The whole of the paper: tune (3.1), distil (3.2), score by disagreement (3.3)."""
    from bigtrain.methods.defend.compared import compared
    from bigtrain.methods.defend.detector import scoring_of
    from bigtrain.models.attention import resolve_backend, torch_dtype
    from bigtrain.training.judging import judged
    from bigtrain.training.sanity_line import print_sanity_line

    given.to(setup.accelerator.device)
    backend: str = resolve_backend(config.attention, setup.accelerator.device, torch_dtype(setup.precision))
    backend = "sdpa, xformers where lengths differ" if (config.attention, backend) == ("auto", "xformers") else backend
    guide = given.vit.guide if kept(config) != "random" and config.distil else ""
    guided = f"; masks guided by the attention of {guide}" if guide else ""
    setup.announce(f"defend: {split}; teacher {given.described}; attention {backend}{guided}")
    print_sanity_line(setup, given, split.train, split.fitted_N, config.image_size)
    teacher = tuned_teacher(config, setup, split, given) if config.tune else given
    if not config.distil:
        return Result({"leaves": LEAVES["tune"]}, "the teacher is tuned", LEAVES["tune"])
    student = masked_distillation(config, setup, split, teacher)
    scoring = scoring_of(config, setup.precision)
    detector, plain, floors = compared(given, teacher, student, scoring, is_tuned=config.tune)
    method = "DEFEND" if config.tune else "masked distillation"
    return judged(config, setup, split, detector, method=method, plain=plain, floors=floors)


def tuned_teacher(config: Config, setup: Setup, split: Split, given: Network) -> Network:
    """3.1: patches of one object come to agree. Leaves teacher.safetensors in the run folder, which ends the stage."""
    if tuned := setup.left(LEAVES["tune"], attention=config.attention):
        return tuned
    prototypes = config.prototypes or 2 * max(1, len(split.train.classes_shown(split.fitted_N)))
    return dense_tuning(config, setup, split.train, split.fitted_N, given, prototypes=prototypes, leaves=LEAVES["tune"])


def masked_distillation(config: Config, setup: Setup, split: Split, teacher: Network) -> Network:
    """3.2: a student from scratch predicts the teacher from a part of the patches. Leaves student.safetensors."""
    import torch

    from bigtrain.data.views import Resized
    from bigtrain.methods.defend.equations import distillation_loss
    from bigtrain.methods.defend.masks import visible_count, visible_patches
    from bigtrain.methods.defend.network import student_network
    from bigtrain.models.flops import trained_flops
    from bigtrain.training.optim import adamw, decay_groups, scaled_lr, schedule, set_schedule
    from bigtrain.training.stage import Stage
    from bigtrain.training.teacher_tokens import TeacherTokens

    if trained := setup.left(LEAVES["distil"], attention=config.attention):
        return trained
    torch.manual_seed(config.seed)
    decoder, last = 0 if config.predict == "visible" else config.decoder_blocks, config.distilled_blocks
    new_student = partial(
        student_network, teacher, student_architecture(config, teacher), config.drop_path, attention=config.attention,
        decoder_blocks=decoder, distilled_blocks=last,
    )  # fmt: skip
    student = new_student().vit.train()
    student.recompute = config.run.recompute
    lr = scaled_lr(config.distil_lr, config.distil_batch, config.lr_batch)
    visible = visible_count(math.prod(student.grid_size), config.mask_ratio)
    keep, plan = kept(config), split.train.plan(split.fitted_N, config.distil_batch, config.seed)
    steps = config.distil_steps or config.distil_epochs * plan.batches_per_epoch
    tokens = TeacherTokens(
        setup, teacher, split.train, plan, steps=steps, image_size=config.image_size, layers=last,
        with_attention=keep != "random" and config.mask_ratio > 0, is_tuned=config.tune,
    )  # fmt: skip
    groups = decay_groups(student.named_parameters(), base_lr=lr)
    stage = Stage(
        "distil", setup,
        trained=student, optimizer=adamw(groups, setup.accelerator.device, lr=lr, betas=(0.9, 0.95)),
        state={"student": student}, ema=config.ema_student,
        stream=setup.stream(split.train, plan, Resized(config.image_size), steps=steps), steps=steps, clip=config.clip,
        flops_per_image=trained_flops(student, config.image_size, visible) + tokens.flops_per_image,
    )  # fmt: skip
    warmup = round(config.warmup_epochs * plan.batches_per_epoch)

    for step in stage:
        factor = schedule(config.schedule, stage.step, total=stage.steps, warmup=warmup)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.distil_decay)
        for part in step.parts():
            image_B3HW = teacher.normalise(part.views["image"])
            with setup.autocast():
                seen = tokens.of(part, image_B3HW)  # eq. 2: the teacher sees every patch ...
                visible_BN = visible_patches(seen.guide_BN, part.seed_B, keep=keep, mask_ratio=config.mask_ratio)
                # ... the student a part of them, and it predicts the tokens of these, of the others or of all
                (predicted,) = stage.module(image_B3HW, visible_BN=visible_BN, visible_count=visible, last=last)
            loss_B = distillation_loss(  # eq. 3, 4
                predicted.blocks_LBND, seen.blocks_LBND, visible_BN, predict=config.predict, distance=config.distance,
                normalisation=config.normalisation, normalise_student=config.normalise_student,
            )  # fmt: skip
            step.backward(setup.mean(part, loss_B))
        step.update(lr=factor * lr)

    tokens.remove()
    return setup.leave(LEAVES["distil"], replace(made := new_student(), trunk=stage.into(made.vit)))


main = partial(run_recipe, Recipe("defend", Config, __doc__ or "", check, read, load, defend, LEAVES, with_preset))

if __name__ == "__main__":
    main()
