"""Tune a released ViT on one's own pictures, without labels: better patch features for detectors, from weights alone.

    accelerate launch recipes/tune.py --train data/mine --network vit_small_patch14_dinov2 --out runs/tuned

Dense tuning, the first stage of DEFEND (Salehi et al., 3.1): patches of one object come to agree, under a fresh head
that is thrown away, so the heads of the network's own pretraining are not needed. The last blocks learn, or low-rank
updates of them (--lora-rank). Labels are never trained on. Held-out pictures are looked at before, during and after:
when the features collapse, the run stops and leaves the best state. Leaves teacher.safetensors for --teacher and
--network of other recipes, released/ for timm or transformers (--save-as), and report.html with its patches' pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bigtrain.choices import Backend, Chosen, SaveAs, setting
from bigtrain.models.timm_names import check_source, check_vit_name
from bigtrain.runtime.launch import check_batch, check_moving_average
from bigtrain.training.dense_tuning import DenseTuningMixin, GuardMixin, dense_tuning
from bigtrain.training.mixins import OptimMixin, RunMixin, WeightsMixin, check_pixels
from bigtrain.training.read_unlabelled import Unlabelled, read_unlabelled
from bigtrain.training.run import Recipe, Result, run_recipe

if TYPE_CHECKING:  # what needs torch is imported where it is used
    from bigtrain.models.network import Network
    from bigtrain.training.run_setup import Setup

LEAVES = {"tune": "teacher.safetensors"}
UNKNOWN_OBJECTS = 32  # kinds of objects, where neither labels nor --objects say how many


@dataclass(frozen=True)
class Config(RunMixin, OptimMixin, GuardMixin, DenseTuningMixin, WeightsMixin):
    train: str = ""  # Shard set to tune on: any pictures.
    network: str = "vit_small_patch14_dinov2.lvd142m"
    """A ViT: a timm name, an hf-hub:ORG/NAME, a local file of weights, or a folder in the form of Hugging Face."""
    arch: str = ""  # The timm name that a local file's weights belong to; our own files and folders record theirs.
    pretrained: bool = True  # --no-pretrained: a name's network with random weights.
    attention: Backend = "auto"
    train_limit: int = setting(0, 0)  # Tune on a seeded choice of this many images; 0: all.
    objects: int = setting(0, 0)
    """How many kinds of objects the pictures show, about: there are twice as many prototypes. 0: as many as the shards
    have classes, or 32 where they have none."""
    lora_rank: int = setting(0, 0)  # Tune low-rank updates of the blocks (Hu et al. 2022), merged at the end; 0: whole.
    save_as: SaveAs = ""  # Also write released/, a folder that timm, or transformers ("hf"), loads.
    score_batch: int = setting(64, 1)  # Images of a forward pass of each process when looking at held-out ones.


def check(config: Config) -> None:
    check_pixels(config)
    check_source(config.network, is_vit=True)
    if config.arch:
        check_vit_name(config.arch)
    if config.objects and config.prototypes:
        raise ValueError("--objects and --prototypes both set the number of prototypes: give only one.")
    if config.prototypes == 1:
        raise ValueError("--prototypes is 1: with one prototype every patch agrees with every other; use 2 or more.")
    if config.ema_teacher:
        check_moving_average("--ema-teacher")
    check_batch(config.tune_batch, config.run.accumulate)


def load(config: Config, images: Unlabelled, precision: Chosen) -> Network:
    import torch

    from bigtrain.methods.defend.checks import check_tuning
    from bigtrain.models.architecture import Architecture
    from bigtrain.models.load_network import load_network
    from bigtrain.models.lora import check_rank
    from bigtrain.models.sanity import check_sees
    from bigtrain.models.save_as import model_type

    torch.manual_seed(config.seed)  # of --no-pretrained
    given = load_network(
        config.network, Architecture(config.arch) if config.arch else None, pretrained=config.pretrained,
        needs_vit=True, weights_key=config.weights_key, image_size=config.image_size, mean=config.mean,
        std=config.std, attention=config.attention,
    )  # fmt: skip
    check_tuning(config, given)
    if config.lora_rank:
        check_rank(given.vit.backbone.blocks[-config.tuned_blocks :], config.lora_rank)
    check_sees(given, config.image_size)
    if config.save_as == "hf":
        model_type(given.architecture.model)
    return given


def tune(config: Config, setup: Setup, images: Unlabelled, given: Network) -> Result:
    """Tune, watched by a guard; then look at what has changed."""
    from bigtrain.models.load_network import load_network
    from bigtrain.models.save_as import save_as
    from bigtrain.training.feature_look import in_words
    from bigtrain.training.sanity_line import print_sanity_line
    from bigtrain.training.tuning_guard import Guard
    from bigtrain.training.tuning_page import card_of, write_page_of

    given.to(setup.accelerator.device)
    shown = len(images.train.classes_shown(images.fitted_N))
    prototypes = config.prototypes or 2 * (config.objects or shown or UNKNOWN_OBJECTS)
    how = f"low-rank updates ({config.lora_rank}) of the last" if config.lora_rank else "the last"
    setup.announce(f"tune: {images}; {given.described}; {how} {config.tuned_blocks} blocks, {prototypes} prototypes")
    print_sanity_line(setup, given, images.train, images.fitted_N, config.image_size)
    guard = Guard(config, setup, images.train, images.held_out_N, given)
    tuned = setup.left(LEAVES["tune"], attention=config.attention) or dense_tuning(
        config, setup, images.train, images.fitted_N, given,
        prototypes=prototypes, leaves=LEAVES["tune"], lora_rank=config.lora_rank, guard=guard,
    )  # fmt: skip
    before, after, best = guard.rows[0], guard.rows[-1], guard.best()
    if guard.problem:
        tuned = setup.leave(LEAVES["tune"], load_network(guard.best_file(best["step"]), attention=config.attention))
        after = best
    guard.end()
    record = {
        "method": "dense tuning", "network": given.architecture.model, "seed": config.seed, "prototypes": prototypes,
        "images": len(images.fitted_N), "stopped": guard.problem, "kept_step": after["step"], "before": before,
        "after": after, "looks": guard.rows,
    }  # fmt: skip
    if setup.accelerator.is_main_process:
        write_page_of(setup.run / "report.html", config, images, given, tuned, record)
        if config.save_as:
            save_as(config.save_as, tuned, setup.run / "released", card_of(record, images, config))
    ended = f"stopped, because {guard.problem}; the state of step {after['step']} is kept; " if guard.problem else ""
    if not guard.problem and best["step"] != after["step"]:
        ended = f"the best look was at step {best['step']}, {guard.best_file(best['step']).name}; "
    return Result(record, f"{ended}before: {in_words(before)}; after: {in_words(after)}")


main = partial(run_recipe, Recipe("tune", Config, __doc__ or "", check, read_unlabelled, load, tune, LEAVES))

if __name__ == "__main__":
    main()
