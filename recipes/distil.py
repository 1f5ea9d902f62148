"""Distil the features of any networks into a small one, on one's own pictures and without labels.

    accelerate launch recipes/distil.py --train data/mine --teachers tf_efficientnet_lite0.in1k \\
        --model vit_tiny_patch16_224 --image-size 64 --patch-size 8 --out runs/small

The student, a ViT or a CNN of timm, learns its teachers' patch and pooled features: cosine and smooth L1, after
RADIO (Ranzinger et al. 2024a), each teacher's targets made alike in all directions over the data first (PHI-S, 2024b).
Leaves network.safetensors for --teacher and --network of other recipes; the figures beside it are of held-out
pictures, next to its teachers', the same network's with random weights, and those of --compare.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bigtrain.choices import HIGHEST_LR, BatchNorm, Chosen, Schedule, is_hub, is_local, setting
from bigtrain.models.timm_names import check_network_name, check_source
from bigtrain.runtime.launch import check_batch, check_moving_average
from bigtrain.training.mixins import OptimMixin, RunMixin
from bigtrain.training.read_unlabelled import Unlabelled, read_unlabelled
from bigtrain.training.run import Recipe, Result, run_recipe

if TYPE_CHECKING:  # what needs torch is imported where it is used
    from bigtrain.models.network import Network
    from bigtrain.training.run_setup import Setup

LEAVES = {"distil": "network.safetensors"}
MOMENTS_IMAGES = 2000  # that a teacher's mean and covariance are measured on


@dataclass(frozen=True)
class Config(RunMixin, OptimMixin):
    train: str = ""  # Shard set to train on: any pictures.
    teachers: tuple[str, ...] = ("tf_efficientnet_lite0.in1k",)
    """Networks: timm names, hf-hub:ORG/NAME, local files or folders. A file that does not say what it belongs to:
    NAME=FILE, as in resnet50=weights.pth."""
    teacher_size: int = setting(0, 0)
    """Side of the pictures that teachers see: the student's views, resized; 0: as they are. The figures of teachers are
    of pictures read at this size."""
    model: str = "vit_tiny_patch16_224"
    """The student: a timm network. The three settings below change the definition of a vit_* where they are not 0."""
    image_size: int = setting(224, 1)
    patch_size: int = setting(0, 0)
    depth: int = setting(0, 0)
    compare: tuple[str, ...] = ()  # Further networks whose figures stand beside the student's.
    pretrained: bool = True  # --no-pretrained: teachers of a name with random weights.

    train_limit: int = setting(0, 0)  # Train on a seeded choice of this many images; 0: all.
    validation_share: float = setting(0.05, 0.001, 0.9)  # Share of the images that is held out; of small sets more.
    guard_images: int = setting(1000, 8)  # At most so many of the held-out images are looked at.
    cache_targets: bool = False
    """Compute the teachers' features of whole pictures once, each within --cache-gib; the student then sees whole
    pictures, not random crops."""
    batch_norm: BatchNorm = "trained"
    """Of a student that has it: trained over the batches of all processes, or kept as it is at the start."""
    epochs: int = setting(100, 1)
    batch: int = setting(256, 1)  # Images a step, over all processes.
    lr: float = setting(1e-3, 0, HIGHEST_LR)
    weight_decay: float = setting(0.02, 0)
    warmup_epochs: float = setting(1.0, 0)
    schedule: Schedule = "cosine"
    drop_path: float = setting(0.0, 0, 0.99)
    crop_scale: tuple[float, float] = setting((0.4, 1.0), 0.001, 1)
    mirror: bool = True  # Mirror half of the random crops; not for letters.
    ema: float = setting(0.0, 0, 1)  # Momentum of a moving average of the weights, which becomes the network; 0: none.
    weights: Literal["fp32", "fp16"] = "fp32"  # How the network is stored; the figures are of the weights as stored.
    score_batch: int = setting(64, 1)  # Images of a forward pass of each process when looking at held-out ones.


class Networks(NamedTuple):
    student: Network
    teachers: dict[str, Network]
    compared: dict[str, Network]


def check(config: Config) -> None:
    check_network_name(config.model)
    if not config.teachers:
        raise ValueError("--teachers names no network: give one or more, as in --teachers tf_efficientnet_lite0.in1k.")
    for source in (*config.teachers, *config.compare):
        check_source(named(source)[1])
    if len({*config.teachers, *config.compare}) < len(config.teachers) + len(config.compare):
        raise ValueError("--teachers and --compare name a network twice: name each once.")
    if config.ema:
        check_moving_average("--ema")
    check_batch(config.batch, config.run.accumulate)


def named(source: str) -> tuple[str, str]:
    """The architecture and the source of NAME=FILE; "" and the source of anything else."""
    name, found, file = source.partition("=")
    return (name, file) if found and not is_local(source.partition("=")[0]) and is_local(file) else ("", source)


def load(config: Config, images: Unlabelled, precision: Chosen) -> Networks:
    import torch

    from bigtrain.models.architecture import Architecture, asked_for
    from bigtrain.models.dense_features import dense_grid
    from bigtrain.models.load_network import load_network
    from bigtrain.models.sanity import check_sees
    from bigtrain.training.trunk import check_training

    torch.manual_seed(config.seed)
    student = load_network(
        config.model, asked_for(config.model, "", config.image_size, config.patch_size, config.depth),
        pretrained=False, drop_path=config.drop_path,
    )  # fmt: skip
    check_sees(student, config.image_size)
    check_training(student.trunk, config.batch_norm, config.run)

    def loaded(source: str) -> Network:
        name, where = named(source)
        size = config.teacher_size or config.image_size
        architecture = Architecture(name) if name else None
        is_named = not (is_local(where) or is_hub(where))
        network = load_network(where, architecture, pretrained=config.pretrained or not is_named, image_size=size)
        check_sees(network, size)
        dense_grid(network.trunk, size)  # refuses a network without a map of features
        return network

    return Networks(
        student, {source: loaded(source) for source in config.teachers},
        {source: loaded(source) for source in config.compare},
    )  # fmt: skip


def distil(config: Config, setup: Setup, images: Unlabelled, networks: Networks) -> Result:
    """Learn the teachers' features; then compare what the features are worth."""
    from bigtrain.data.views import Resized
    from bigtrain.evaluation.collect import Kept
    from bigtrain.training.distillation import remove_targets
    from bigtrain.training.feature_look import classes_of, figures_of, in_words

    device = setup.accelerator.device
    begun = networks.student
    parameters = sum(p.numel() for p in begun.backbone.parameters()) / 1e6
    teachers = ", ".join(f"{name} ({each.described})" for name, each in networks.teachers.items())
    setup.announce(f"distil: {images}; {teachers}, into {begun.architecture.model} with {parameters:.1f} M parameters")
    untrained = copy.deepcopy(begun.trunk)
    for network in (*networks.teachers.values(), *networks.compared.values()):
        network.to(device)
    made = setup.left(LEAVES["distil"]) or learn(config, setup, images, networks)
    remove_targets(setup)

    class_of = classes_of(images.train, images.held_out_N)
    looked: dict[str, dict[str, Any]] = {}
    random = replace(begun, trunk=untrained).to(device)
    rows = {"student": (made, config.image_size), "random weights": (random, config.image_size)}
    rows |= {name: (each, config.teacher_size or config.image_size) for name, each in networks.teachers.items()}
    rows |= {name: (each, each.image_size or config.image_size) for name, each in networks.compared.items()}
    for size in sorted({size for _, size in rows.values()}):
        pictures = Kept(setup.in_order(images.train, images.held_out_N, Resized(size), config.score_batch))
        for name, (network, own) in rows.items():
            if own == size:
                looked[name] = figures_of(setup, pictures, class_of, network)
    looked = {name: looked[name] for name in rows}
    for name, row in looked.items():
        setup.accelerator.print(f"{name}: {in_words(row)}")
    record = {
        "method": "feature distillation", "seed": config.seed, "images": len(images.fitted_N),
        "parameters_m": parameters, "figures": looked,
    }  # fmt: skip
    return Result(record, f"student: {in_words(looked['student'])}", LEAVES["distil"])


def learn(config: Config, setup: Setup, images: Unlabelled, networks: Networks) -> Network:
    """The student follows its teachers on crops or, with cached targets, on whole pictures."""
    import torch

    from bigtrain.data.protocol import seeded_choice
    from bigtrain.data.views import RandomResizedCrop, Resized
    from bigtrain.models.dense_features import dense_grid, freeze_unused
    from bigtrain.objectives.feature_matching import matching_loss
    from bigtrain.training import trunk
    from bigtrain.training.distillation import Student, Targets
    from bigtrain.training.optim import adamw, decay_groups, scaled_lr, schedule, set_schedule
    from bigtrain.training.stage import Stage

    begun, size = networks.student, config.image_size
    plan = images.train.plan(images.fitted_N, config.batch, config.seed)
    plan = trunk.without_padding(plan, begun.trunk, config.batch_norm)
    grid, widths = dense_grid(begun.trunk.cpu(), size)
    if unused := freeze_unused(begun.trunk, size):
        setup.accelerator.print(
            f"note: {', '.join(unused[:3])}{', ...' if unused[3:] else ''} of the student stay random: "
            "no patch or pooled feature depends on them"
        )
    moments_N = seeded_choice(images.fitted_N, MOMENTS_IMAGES, config.seed)
    targets = []
    for number, teacher in enumerate(networks.teachers.values()):
        of_teacher = Targets(setup, teacher, config.teacher_size or size, grid, config.score_batch)
        of_teacher.standardise(images.train, moments_N, size, setup.run / f"targets-{number}.safetensors")
        if config.cache_targets:
            of_teacher.cache(images.train, images.fitted_N, size)
        targets.append(of_teacher)
    torch.manual_seed(config.seed)
    student = Student(begun.trunk, widths, targets)
    student = trunk.prepare_batch_norm(student, config.batch_norm).train()
    trunk.prepare_trunk(student.trunk, config.run, 0.0)
    lr = scaled_lr(config.lr, config.batch, config.lr_batch)
    view = Resized(size) if config.cache_targets else RandomResizedCrop(size, config.crop_scale, config.mirror)
    groups, steps = decay_groups(student.named_parameters(), base_lr=lr), config.epochs * plan.batches_per_epoch
    stage = Stage(
        "distil", setup,
        trained=student, optimizer=adamw(groups, setup.accelerator.device, lr=lr),
        state={"student": student}, ema=config.ema, clip=config.clip,
        stream=setup.stream(images.train, plan, view, steps=steps), steps=steps,
        flops_per_image=begun.training_flops(size),
    )  # fmt: skip
    warmup = round(config.warmup_epochs * plan.batches_per_epoch)

    for step in stage:
        factor = schedule(config.schedule, stage.step, total=stage.steps, warmup=warmup)
        set_schedule(stage.optimizer, lr_factor=factor, weight_decay=config.weight_decay)
        for part in step.parts():
            wanted = [each.of(part) for each in targets]
            with setup.autocast():
                predicted = stage.module(begun.normalise(part.views["image"]))
            losses = [matching_loss(p, t, q, u) for (p, q), (t, u) in zip(predicted, wanted, strict=True)]
            step.backward(setup.mean(part, torch.stack(losses).mean(dim=0)))
        step.update(lr=factor * lr)

    learnt = trunk.with_batch_norm(stage.into(student)).trunk
    dtype = torch.float16 if config.weights == "fp16" else torch.float32
    return setup.leave(LEAVES["distil"], replace(begun, trunk=learnt.to(dtype).float().eval()), dtype)


main = partial(run_recipe, Recipe("distil", Config, __doc__ or "", check, read_unlabelled, load, distil, LEAVES))

if __name__ == "__main__":
    main()
