"""DEFEND: Salehi et al., "Redefining Normal: A Novel Object-Level Approach for Multi-Object Novelty Detection".

    accelerate launch recipes/defend.py              # the preset: embedded Fashion-MNIST, offline
    accelerate launch recipes/defend.py --train data/train --test data/test --known dog --out runs/dog

Stage 1 (3.1) tunes the teacher's last blocks so that patches of one object agree; stage 2 (3.2) distils it into a
student that sees half of the patches; novelty (3.3) is their disagreement. The defaults are the paper's values and,
where it is silent or may be read in two ways, the authors' code's.

What the student predicts. The paper's student infers "the full context by only partially observing the input"; the
authors' code takes the loss on the patches that the student sees, which is the default here (--predict visible). Such a
student can copy what it sees: it explains novel pictures as well as known ones. --predict hidden takes the loss on the
hidden patches, all on both; then each patch is scored by halves of the picture that hide it. What a student that
ignores the picture would score stands beside every figure: a distillation means something above it alone.

Which half it sees. The code shows the patches that the teacher attends to ("guided, code": --keep attended), the
paper's Fig. 2 hides them ("guided, Fig. 2": --keep unattended).
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from bigtrain.data.workers import prepare_workers
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import check_ranges, print_if_asked, read_settings
from bigtrain.text import clean, clock
from recipes.defend_settings import (
    LIMITS,
    Config,
    check_networks,
    check_settings,
    kept,
    read_data,
    student_architecture,
)
from recipes.network_settings import Data
from recipes.presets.fashion.prepare import PRESET, build_embedded_shards, with_embedded_data

if TYPE_CHECKING:  # what needs torch is imported where it is used, behind all mistakes that can be told without
    from torch import Tensor, nn

    from bigtrain.data.plan import Plan
    from bigtrain.data.shard_set import ShardSet
    from bigtrain.data.stream import Batch
    from bigtrain.models.heads import TokenQueue
    from bigtrain.models.weights import Pretrained
    from recipes.run_setup import Setup

LEAVES = {"tune": "teacher.safetensors", "distil": "student.safetensors"}  # stage -> file, in their order


def main(argv: list[str] | None = None) -> None:
    with user_errors("defend.py"):
        argv = sys.argv[1:] if argv is None else argv
        config = read_settings(Config, argv, description=__doc__)
        embedded = not config.train
        if embedded:
            config = with_embedded_data(read_settings(Config, argv, PRESET, description=__doc__))
        check_ranges(config, LIMITS)
        print_if_asked(config, argv)
        if not config.test or not config.run.out:
            raise ValueError("--test SHARDS and --out FOLDER are needed: what to judge on, and where the run goes.")
        run = RunFolder(config.run.out, config)
        if run.is_already_finished():
            return
        if embedded:
            build_embedded_shards()
        data = read_data(config)
        check_settings(config)
        defend(config, run, data)


def defend(config: Config, run: RunFolder, data: Data) -> None:
    """The whole of the paper: tune, distil, judge. What an earlier start has finished is not done again."""
    began = time.monotonic()
    prepare_workers(config.run.workers)
    from bigtrain.data.pictures import jpeg_decoder
    from bigtrain.models.attention import resolve_backend, torch_dtype
    from bigtrain.models.vit import Architecture
    from bigtrain.models.weights import load_vit
    from bigtrain.runtime.precision import choose_precision
    from recipes.run_setup import Setup

    train, parts, protocol = data.train, data.parts, data.protocol
    given = load_vit(config.teacher, Architecture(config.arch) if config.arch else None, attention=config.attention)
    precision = run.resolved("precision") or choose_precision(config.precision)
    check_networks(config, given, precision)
    setup = Setup.begin(run, precision, LEAVES)
    accelerator = setup.accelerator
    given.vit.to(accelerator.device)
    accelerator.print(
        f"defend: {train.manifest.dataset}, {len(parts.fitted_N)} known images ({clean(', '.join(protocol.known))}) to "
        f"train on and {len(parts.test_N)} to judge; teacher {given.architecture.model}, {given.report}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}, precision {precision}, attention "
        f"{resolve_backend(config.attention, accelerator.device, torch_dtype(precision))}, JPEGs by {jpeg_decoder()}"
    )
    fitted = train.plan(parts.fitted_N, config.distil_batch, config.seed)
    teacher = given
    if config.tune:
        prototypes = config.prototypes or 2 * train.count_classes(parts.fitted_N)
        teacher = dense_tuning(config, setup, train, fitted, given, prototypes)
        if not config.distil:
            if accelerator.is_main_process:
                run.finish({"leaves": LEAVES["tune"]})
            setup.end_trackers()
            accelerator.print(f"the tuned teacher: {run / LEAVES['tune']}")
            return
    student = masked_distillation(config, setup, train, fitted, teacher)

    from recipes.defend_judging import judged
    from recipes.teacher_tokens import remove_tokens

    remove_tokens(setup)
    results = judged(config, setup, data, given, teacher, student)
    if accelerator.is_main_process:
        run.finish(results)
    setup.end_trackers()
    others = ", ".join(f"{name} {figures['auroc']['value']:.3f}" for name, figures in results["comparisons"].items())
    auroc = results["auroc"]
    accelerator.print(
        f"AUROC {auroc['value']:.3f} (95 % interval {auroc['low']:.3f} to {auroc['high']:.3f}); {others}; "
        f"this start took {clock(time.monotonic() - began)}; report: {run / 'report.html'}"
    )


def dense_tuning(
    config: Config, setup: Setup, train: ShardSet, fitted: Plan, given: Pretrained, prototypes: int
) -> Pretrained:
    """3.1: patches of one object come to agree. Leaves teacher.safetensors in the run folder, which ends the stage."""
    import torch
    from torch import nn

    from bigtrain.data.views import MultiCrop, to_float
    from bigtrain.models.flops import trained_flops, vit_forward_flops
    from bigtrain.models.heads import DenseTuner, TokenQueue, unit_rows
    from bigtrain.models.weights import load_vit, save_vit
    from bigtrain.objectives.losses import align_to_crops, dense_loss
    from bigtrain.runtime.optim import adamw, cosine, decay_groups, follow, scaled_lr, set_schedule
    from recipes.stage import Stage

    accelerator, tuned_file = setup.accelerator, setup.run / LEAVES["tune"]
    if tuned_file.is_file():
        return load_vit(str(tuned_file), attention=config.attention, device=accelerator.device)
    torch.manual_seed(config.seed)
    tuner = DenseTuner(copy.deepcopy(given.vit), prototypes, config.tuned_blocks)
    tuner.vit.recompute = config.run.recompute
    queue = TokenQueue(config.queue)
    state = nn.ModuleDict({"tuner": tuner, "queue": queue})
    ema = copy.deepcopy(tuner).requires_grad_(False)
    if config.ema_teacher:
        state["ema"] = ema
    lr, head_lr = (scaled_lr(lr, config.tune_batch, config.lr_batch) for lr in (config.tune_lr, config.head_lr))
    groups = decay_groups(tuner.vit.named_parameters(), base_lr=lr, layer_decay=config.layer_decay)
    groups += decay_groups([*tuner.head.named_parameters(), *tuner.prototypes.named_parameters()], base_lr=head_lr)
    flops = vit_forward_flops(tuner.vit, config.image_size) + config.crops * trained_flops(tuner.vit, config.crop_size)
    flops += config.global_crops * trained_flops(tuner.vit, config.image_size)
    views = MultiCrop(config.image_size, config.crop_size, config.crops, config.crop_scale, config.global_crops)
    plan = replace(fitted, global_batch=config.tune_batch)
    stage = Stage(
        "tune", setup,
        trained=tuner, optimizer=adamw(groups, accelerator.device, lr=head_lr), state=state, clip=config.clip,
        stream=setup.stream(train, plan, views), steps=config.tune_epochs * plan.batches_per_epoch,
        flops_per_image=flops,
    )  # fmt: skip
    source = ema if config.ema_teacher else stage.module
    kinds = [("crops", "boxes"), ("global_crops", "global_boxes")][: 2 if config.global_crops else 1]
    patch = given.vit.patch_size

    for batch in stage.batches():
        factor = cosine(stage.step, total=stage.steps, start=1.0, end=0.0)
        decay = cosine(stage.step, total=stage.steps, start=config.tune_decay[0], end=config.tune_decay[1])
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=decay)
        q_BhwK = cluster_map(config, setup, source, queue, batch, given)
        for part, q_bhwK in zip(stage.parts(batch), q_BhwK.chunk(config.run.accumulate), strict=True):
            crops = [to_float(part.views[crop].flatten(0, 1), given.mean, given.std) for crop, _ in kinds]
            with setup.autocast():
                _, cosines = stage.module(*crops)  # z' p
            loss_B = torch.zeros_like(part.weight_B)
            for cosines_RMK, crop, (_, boxes) in zip(cosines, crops, kinds, strict=True):
                box_BV4 = part.views[boxes]
                grid = (crop.shape[-2] // patch, crop.shape[-1] // patch)
                target_BVMK = align_to_crops(q_bhwK, box_BV4, patch_size=patch, grid=grid)  # alpha(Q)
                cosines_BVMK = cosines_RMK.unflatten(0, box_BV4.shape[:2])
                share = box_BV4.shape[1] / (config.crops + config.global_crops)
                loss_B = loss_B + share * dense_loss(cosines_BVMK, target_BVMK, temperature=config.temperature)  # eq. 1
            stage.backward(part.mean(loss_B, accelerator.num_processes))
        if stage.update():
            stage.constrain("prototypes.weight_KD", unit_rows)
            if config.ema_teacher:
                follow(ema, tuner, cosine(stage.step, total=stage.steps, start=config.ema_momentum, end=1.0))
                ema.prototypes.weight_KD.copy_(unit_rows(ema.prototypes.weight_KD))
        stage.advance(batch, lr=factor * lr)

    tuned = replace(given, vit=stage.into(copy.deepcopy(given.vit), "vit."))
    if accelerator.is_main_process:
        save_vit(tuned_file, tuned.vit, tuned.architecture, mean=tuned.mean, std=tuned.std)
    return tuned


def cluster_map(
    config: Config, setup: Setup, source: nn.Module, queue: TokenQueue, batch: Batch, given: Pretrained
) -> Tensor:
    """The optimal cluster map Q of each image over its patch grid (3.1), balanced over the tokens of all ranks."""
    import torch

    from bigtrain.data.views import to_float
    from bigtrain.objectives.sinkhorn import sinkhorn

    accelerator = setup.accelerator
    with torch.no_grad(), setup.autocast():
        parts = (batch.part(number, config.run.accumulate) for number in range(config.run.accumulate))
        seen = [source(to_float(part.views["image"], given.mean, given.std)) for part in parts]
        z_TD = torch.cat([z_BND.flatten(0, 1) for (z_BND,), _ in seen]).float()
        scores = [cosines_BNK.flatten(0, 1).float() for _, (cosines_BNK,) in seen]
        valid_T = (batch.weight_B > 0).repeat_interleave(len(z_TD) // len(batch.weight_B))
        if older := config.queue and queue.full():
            older_TD = queue.share(accelerator.process_index, accelerator.num_processes)
            scores = [source(older_TD)[1][0].float(), *scores]
    scores_NK = torch.cat(scores)
    first = len(scores_NK) - len(z_TD) if older else 0
    valid_N = torch.cat([valid_T.new_ones(first), valid_T])
    q_TK = sinkhorn(scores_NK, config.epsilon, config.sinkhorn_iterations, valid_N=valid_N)[first:]
    if config.queue:
        z_TD, valid_T = accelerator.gather(z_TD), accelerator.gather(valid_T)
        queue.push(z_TD[valid_T & z_TD.isfinite().all(dim=1)])  # one that is not would spoil each step to come
    side = config.image_size // given.vit.patch_size
    return q_TK.unflatten(0, (len(batch.weight_B), side, side))


def masked_distillation(config: Config, setup: Setup, train: ShardSet, fitted: Plan, teacher: Pretrained) -> Pretrained:
    """3.2: a student from scratch predicts the teacher from a part of the patches. Leaves student.safetensors."""
    import torch
    from torch import nn

    from bigtrain.data.masks import visible_count, visible_patches
    from bigtrain.data.views import Resized, to_float
    from bigtrain.models.flops import trained_flops, vit_forward_flops
    from bigtrain.models.vit import masked_student
    from bigtrain.models.weights import Pretrained, load_vit, save_vit
    from bigtrain.objectives.losses import distillation_loss
    from bigtrain.runtime.optim import adamw, decay_groups, follow, scaled_lr, schedule, set_schedule
    from recipes.stage import Stage
    from recipes.teacher_tokens import TeacherTokens

    accelerator, student_file = setup.accelerator, setup.run / LEAVES["distil"]
    if student_file.is_file():
        return load_vit(str(student_file), attention=config.attention, device=accelerator.device)
    torch.manual_seed(config.seed)
    architecture = student_architecture(config, teacher)
    decoder = 0 if config.predict == "visible" else config.decoder_blocks
    student = masked_student(
        architecture, drop_path=config.drop_path, attention=config.attention, decoder_blocks=decoder
    ).train()
    student.recompute = config.run.recompute
    lr = scaled_lr(config.distil_lr, config.distil_batch, config.lr_batch)
    groups = decay_groups(student.named_parameters(), base_lr=lr)
    visible = visible_count(math.prod(student.backbone.patch_embed.grid_size), config.mask_ratio)
    keep = kept(config)
    guided = keep != "random" and config.mask_ratio > 0
    steps = config.distil_steps or config.distil_epochs * fitted.batches_per_epoch
    tokens = TeacherTokens(
        setup, teacher, train, fitted, steps=steps, batch=config.score_batch,
        image_size=config.image_size, layers=config.distilled_blocks, with_attention=guided,
    )  # fmt: skip
    flops = trained_flops(student, config.image_size, visible)
    flops += 0 if tokens.features is not None else vit_forward_flops(teacher.vit, config.image_size)
    state, ema = nn.ModuleDict({"student": student}), copy.deepcopy(student).requires_grad_(False)
    if config.ema_student:
        state["ema"] = ema
    stage = Stage(
        "distil", setup,
        trained=student, state=state, clip=config.clip,
        optimizer=adamw(groups, accelerator.device, lr=lr, betas=(0.9, 0.95)),
        stream=setup.stream(train, fitted, Resized(config.image_size)),
        steps=steps,
        flops_per_image=flops,
    )  # fmt: skip
    warmup = round(config.warmup_epochs * fitted.batches_per_epoch)

    for batch in stage.batches():
        factor = schedule(config.schedule, stage.step, total=stage.steps, warmup=warmup)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.distil_decay)
        for part in stage.parts(batch):
            image_B3HW = to_float(part.views["image"], teacher.mean, teacher.std)
            with setup.autocast():
                seen = tokens.of(part, image_B3HW)  # eq. 2: the teacher sees every patch ...
                attention_BN = seen.attention_BN
                if attention_BN is None:
                    attention_BN = image_B3HW.new_ones(seen.tokens_BND.shape[:2])
                visible_BN = visible_patches(attention_BN, part.seed_B, keep=keep, mask_ratio=config.mask_ratio)
                # ... the student a part of them, and it predicts the tokens of these, of the others or of all
                (predicted,) = stage.module(image_B3HW, visible_BN=visible_BN, last=config.distilled_blocks)
            loss_B = distillation_loss(  # eq. 3, 4
                predicted.blocks_LBND,
                seen.blocks_LBND,
                visible_BN,
                predict=config.predict,
                normalisation=config.normalisation,
                normalise_student=config.normalise_student,
                distance=config.distance,
            )
            stage.backward(part.mean(loss_B, accelerator.num_processes))
        if stage.update() and config.ema_student:
            follow(ema, student, config.ema_student)
        stage.advance(batch, lr=factor * lr)

    student = masked_student(architecture, attention=config.attention, decoder_blocks=decoder)
    student = ema.eval() if config.ema_student else stage.into(student)
    if accelerator.is_main_process:
        save_vit(student_file, student, architecture, mean=teacher.mean, std=teacher.std)
    return Pretrained(student, architecture, teacher.mean, teacher.std, "")


if __name__ == "__main__":
    main()
