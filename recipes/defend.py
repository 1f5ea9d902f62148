"""DEFEND: Salehi et al., "Redefining Normal: A Novel Object-Level Approach for Multi-Object Novelty Detection".

    accelerate launch recipes/defend.py              # the preset: embedded Fashion-MNIST, offline
    accelerate launch recipes/defend.py --train data/train --test data/test --known dog --out runs/dog

Stage 1 (3.1) tunes the teacher's last blocks so that patches of one object agree; stage 2 (3.2) distils it into a
student that sees half of the patches; novelty (3.3) is their disagreement.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bigtrain.data.masks import Keep, visible_patches
from bigtrain.data.plan import Plan, check_divides
from bigtrain.data.protocol import Protocol, seeded_choice, split
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import MultiCrop, Resized, to_float
from bigtrain.detectors.distillation import DistillationDetector, Scoring
from bigtrain.detectors.neighbours import pixel_features, token_features
from bigtrain.evaluation.judge import judge
from bigtrain.models.attention import Backend, resolve_backend
from bigtrain.models.heads import DenseTuner, TokenQueue
from bigtrain.models.vit import Architecture, check_image_size, check_pair, masked_student
from bigtrain.models.weights import Pretrained, load_vit, save_vit
from bigtrain.objectives.losses import Distance, Normalisation, align_to_crops, dense_loss, distillation_loss
from bigtrain.objectives.sinkhorn import sinkhorn
from bigtrain.runtime.config import RunSettings, read_settings, result_settings, user_errors
from bigtrain.runtime.log import clock
from bigtrain.runtime.optim import cosine, decay_groups, follow, set_schedule, update, warmup_cosine
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.start import Precision, choose_precision, torch_dtype, world_size_of_launch
from recipes.presets.fashion.prepare import PRESET, with_embedded_data
from recipes.stage import Setup, Stage


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
    ema_teacher: bool = False
    """Take the targets from a moving average of the network, as the authors' code can."""
    ema_momentum: float = 0.9995
    """At the start; it rises to 1 along a cosine."""
    queue: int = 0
    """Projected tokens of earlier batches that join Sinkhorn; 8192 in the authors' code."""

    distil_epochs: int = 10
    distil_batch: int = 64
    mask_ratio: float = 0.5
    keep: Keep = "attended"
    """Which patches the student sees."""
    normalisation: Normalisation = "l2"
    normalise_student: bool = True
    """--no-normalise-student: teacher only, for the pixel level (4.6)."""
    distance: Distance = "squared"
    distilled_blocks: Literal[1, 3, 5] = 1
    distil_lr: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 0.0
    distil_decay: float = 0.05
    drop_path: float = 0.1

    score_batch: int = 64
    """Images a forward pass of each process when scoring."""
    neighbours_bank: int = 10_000
    """At most so many known images serve the two nearest-neighbour figures."""
    seed: int = 0
    precision: Precision = "auto"
    attention: Backend = "auto"

    run: RunSettings = field(default_factory=RunSettings)


def main(argv: list[str] | None = None) -> None:
    with user_errors("defend.py"):
        argv = sys.argv[1:] if argv is None else argv
        config = read_settings(Config, argv)
        if not config.train:
            config = with_embedded_data(read_settings(Config, argv, preset=PRESET))
        if not config.test or not config.run.out:
            raise ValueError("--test SHARDS and --out FOLDER are needed: what to judge on, and where the run goes.")
        defend(config)


def defend(config: Config) -> None:
    """The whole of the paper: tune, distil, judge. What an earlier start has finished is not done again."""
    began = time.monotonic()
    run = RunFolder(config.run.out, config)
    run.check()
    train, test = ShardSet(config.train), ShardSet(config.test)
    protocol = Protocol.of(train.classes, known=config.known, novel=config.novel)
    parts = split(
        protocol,
        train,
        test,
        validation_share=config.validation_share,
        seed=config.seed,
        train_limit=config.train_limit,
        test_limit=config.test_limit,
    )
    given = load_vit(config.teacher, Architecture(config.arch) if config.arch else None, attention=config.attention)
    for side in (config.image_size, config.crop_size) if config.tune else (config.image_size,):
        check_image_size((side, side), given.vit.patch_size)
    for global_batch in (config.tune_batch, config.distil_batch) if config.tune else (config.distil_batch,):
        check_divides(global_batch, world_size_of_launch())
    precision = choose_precision(config.precision, given.vit.width)
    setup = Setup.begin(run, precision, config.run)
    accelerator = setup.accelerator
    given.vit.to(accelerator.device)
    accelerator.print(
        f"defend: {train.manifest.dataset}, {len(parts.fitted_N)} known images ({', '.join(protocol.known)}) to train "
        f"on and {len(parts.test_N)} to judge; teacher {given.architecture.model}, {given.report}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, precision {precision}, attention "
        f"{resolve_backend(config.attention, accelerator.device, torch_dtype(precision))}"
    )
    fitted = Plan(parts.fitted_N, train.shard_N[parts.fitted_N], config.distil_batch, config.seed)
    teacher = given
    if config.tune:
        prototypes = config.prototypes or 2 * train.count_classes(parts.fitted_N)
        teacher = dense_tuning(config, setup, train, fitted, given, prototypes)
    student = masked_distillation(config, setup, train, fitted, teacher)

    scoring = Scoring(
        image_size=config.image_size,
        normalisation=config.normalisation,
        normalise_student=config.normalise_student,
        distance=config.distance,
        distilled_blocks=config.distilled_blocks,
        precision=precision,
        attention=config.attention,
        batch=config.score_batch,
    )

    @torch.no_grad()
    def teacher_features(image_B3HW: Tensor) -> Tensor:
        with accelerator.autocast():
            return token_features(image_B3HW, given)

    views = Resized(config.image_size)
    bank_N = seeded_choice(parts.fitted_N, config.neighbours_bank, config.seed)
    results = judge(
        run.path,
        accelerator,
        DistillationDetector(teacher, student, scoring),
        method="DEFEND" if config.tune else "masked distillation",
        protocol=protocol,
        test=setup.in_order(test, parts.test_N, views, config.score_batch),
        held_out=setup.in_order(train, parts.held_out_N, views, config.score_batch) if len(parts.held_out_N) else None,
        bank=setup.in_order(train, bank_N, views, config.score_batch),
        plain={"pixels": pixel_features, "features of the given teacher": teacher_features},
        settings=result_settings(config),
        seed=config.seed,
    )
    if accelerator.is_main_process:
        run.finish(results)
    plain = ", ".join(f"{name} {figures['auroc']['value']:.3f}" for name, figures in results["comparisons"].items())
    auroc = results["auroc"]
    accelerator.print(
        f"AUROC {auroc['value']:.3f} (95 % interval {auroc['low']:.3f} to {auroc['high']:.3f}); {plain}; "
        f"{clock(time.monotonic() - began)}; report: {run / 'report.html'}"
    )
    accelerator.end_training()


def dense_tuning(
    config: Config, setup: Setup, train: ShardSet, fitted: Plan, given: Pretrained, prototypes: int
) -> Pretrained:
    """3.1: patches of one object come to agree. Leaves teacher.safetensors in the run folder, which ends the stage."""
    accelerator, tuned_file = setup.accelerator, setup.run / "teacher.safetensors"
    if tuned_file.is_file():
        return load_vit(str(tuned_file), attention=config.attention, device=accelerator.device)
    torch.manual_seed(config.seed)
    tuner = DenseTuner(copy.deepcopy(given.vit), prototypes, config.tuned_blocks)
    state = nn.ModuleDict({"tuner": tuner, "queue": TokenQueue(config.queue)})
    if config.ema_teacher:
        state["ema"] = copy.deepcopy(tuner).requires_grad_(False)
    groups = decay_groups(tuner.vit.named_parameters(), base_lr=config.tune_lr)
    added = [*tuner.head.named_parameters(), *tuner.prototypes.named_parameters()]
    groups += decay_groups(added, base_lr=config.head_lr)
    optimizer = torch.optim.AdamW(groups, lr=config.head_lr)
    views = MultiCrop(config.image_size, config.crop_size, config.crops, config.crop_scale, config.global_crops)
    stream = setup.stream(train, replace(fitted, global_batch=config.tune_batch), views)
    stage = Stage(
        "tune", setup,
        trained=tuner, optimizer=optimizer, stream=stream, epochs=config.tune_epochs, state=state,
    )  # fmt: skip
    kinds = [("crops", "boxes"), ("global_crops", "global_boxes")][: 2 if config.global_crops else 1]
    patch = given.vit.patch_size

    for batch in stage.batches():
        set_schedule(
            stage.optimizer,
            lr_factor=cosine(stage.step, total=stage.steps, start=1.0, end=0.0),
            weight_decay=cosine(stage.step, total=stage.steps, start=config.tune_decay[0], end=config.tune_decay[1]),
        )
        image_B3HW = to_float(batch.views["image"], given.mean, given.std)
        crops = [to_float(batch.views[crop].flatten(0, 1), given.mean, given.std) for crop, _ in kinds]

        with accelerator.autocast():
            z_BND, cosines = stage.module(image_B3HW, *crops)  # z of the images; z' p of the crops
            if config.ema_teacher:
                with torch.no_grad():
                    z_BND, _ = state["ema"](image_B3HW)
        q_BhwK = cluster_map(config, accelerator, state, z_BND, batch.weight_B > 0)
        loss_B = torch.zeros_like(batch.weight_B)
        for cosines_RMK, crop, (_, boxes) in zip(cosines, crops, kinds, strict=True):
            box_BV4 = batch.views[boxes]
            grid = (crop.shape[-2] // patch, crop.shape[-1] // patch)
            target_BVMK = align_to_crops(q_BhwK, box_BV4, patch_size=patch, grid=grid)  # alpha(Q)
            cosines_BVMK = cosines_RMK.unflatten(0, box_BV4.shape[:2])
            loss_B = loss_B + dense_loss(cosines_BVMK, target_BVMK, temperature=config.temperature)  # eq. 1
        loss = batch.mean(loss_B / len(kinds), accelerator.num_processes)
        loss = update(accelerator, stage.module, stage.optimizer, loss)
        tuner.prototypes.normalise()
        if config.ema_teacher:
            momentum = cosine(stage.step, total=stage.steps, start=config.ema_momentum, end=1.0)
            follow(state["ema"], tuner, momentum)
        stage.advance(batch, loss=loss)

    tuned = replace(given, vit=tuner.vit.requires_grad_(False))
    if accelerator.is_main_process:
        save_vit(tuned_file, tuned.vit, tuned.architecture, mean=tuned.mean, std=tuned.std)
    return tuned


@torch.no_grad()
def cluster_map(
    config: Config, accelerator: Accelerator, state: nn.ModuleDict, z_BND: Tensor, valid_B: Tensor
) -> Tensor:
    """The optimal cluster map Q of each image over its patch grid (3.1), balanced over the tokens of all ranks."""
    source: Any = state["ema" if config.ema_teacher else "tuner"]
    queue: Any = state["queue"]
    z_TD, valid_T = z_BND.flatten(0, 1).float(), valid_B.repeat_interleave(z_BND.shape[1])
    older = queue.share(accelerator.process_index, accelerator.num_processes) if queue.full() else z_TD[:0]
    scores_NK = source.prototypes(torch.cat([older, z_TD]))
    valid_N = torch.cat([valid_T.new_ones(len(older)), valid_T])
    q_TK = sinkhorn(scores_NK, config.epsilon, config.sinkhorn_iterations, valid_N=valid_N)[len(older) :]
    if config.queue:
        queue.push(accelerator.gather(z_TD)[accelerator.gather(valid_T)])
    side = config.image_size // source.vit.patch_size
    return q_TK.unflatten(0, (len(z_BND), side, side))


def masked_distillation(config: Config, setup: Setup, train: ShardSet, fitted: Plan, teacher: Pretrained) -> Pretrained:
    """3.2: a student from scratch predicts the teacher from half of the patches. Leaves student.safetensors."""
    accelerator, student_file = setup.accelerator, setup.run / "student.safetensors"
    if student_file.is_file():
        return load_vit(str(student_file), attention=config.attention, device=accelerator.device)
    torch.manual_seed(config.seed)
    architecture = replace(teacher.architecture, image_size=config.image_size)
    if config.student:
        architecture = Architecture(config.student, config.image_size)
    student = masked_student(architecture, drop_path=config.drop_path, attention=config.attention).train()
    check_pair(teacher.vit, student, config.distilled_blocks)
    groups = decay_groups(student.named_parameters(), base_lr=config.distil_lr)
    optimizer = torch.optim.AdamW(groups, lr=config.distil_lr, betas=(0.9, 0.95))
    stream = setup.stream(train, fitted, Resized(config.image_size))
    stage = Stage(
        "distil", setup,
        trained=student, optimizer=optimizer, stream=stream, epochs=config.distil_epochs,
    )  # fmt: skip
    warmup = round(config.warmup_epochs * fitted.batches_per_epoch)
    guided = config.keep != "random" and config.mask_ratio > 0

    for batch in stage.batches():
        factor = warmup_cosine(stage.step, total=stage.steps, warmup=warmup) if config.schedule == "cosine" else 1.0
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.distil_decay)
        image_B3HW = to_float(batch.views["image"], teacher.mean, teacher.std)

        with accelerator.autocast():
            with torch.no_grad():  # eq. 2: the teacher sees every patch ...
                (seen,) = teacher.vit(image_B3HW, last=config.distilled_blocks, with_attention=guided)
            attention_BN = seen.attention_BN if guided else image_B3HW.new_ones(seen.tokens_BND.shape[:2])
            visible_BN = visible_patches(attention_BN, batch.seed_B, keep=config.keep, mask_ratio=config.mask_ratio)
            # ... the student half of them
            (predicted,) = stage.module(image_B3HW, visible_BN=visible_BN, last=config.distilled_blocks)
        loss_B = distillation_loss(  # eq. 3, 4
            predicted.blocks_LBND,
            seen.blocks_LBND,
            visible_BN,
            normalisation=config.normalisation,
            normalise_student=config.normalise_student,
            distance=config.distance,
        )
        loss = update(accelerator, stage.module, stage.optimizer, batch.mean(loss_B, accelerator.num_processes))
        stage.advance(batch, loss=loss, lr=factor * config.distil_lr)

    student.requires_grad_(False).eval()
    if accelerator.is_main_process:
        save_vit(student_file, student, architecture, mean=teacher.mean, std=teacher.std)
    return Pretrained(student, architecture, teacher.mean, teacher.std, "")


if __name__ == "__main__":
    main()
