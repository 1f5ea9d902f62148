"""Refuses DEFEND's settings that are contradictory, without effect, or unfit for the networks.

`config` is that of recipes/defend.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bigtrain.choices import Chosen, Keep
from bigtrain.models.timm_names import check_source, check_vit_name

if TYPE_CHECKING:
    from bigtrain.models.architecture import Architecture
    from bigtrain.models.network import Network
    from bigtrain.models.vit import ViT


def check_settings(config: Any) -> None:
    """Refuse settings that contradict each other; imports no torch."""
    if not (config.tune or config.distil):
        raise ValueError("--no-tune and --no-distil leave nothing to do: give one of them.")
    if config.tune and config.prototypes == 1:
        raise ValueError("--prototypes is 1: with one prototype every patch agrees with every other; use 2 or more.")
    if config.predict != "visible" and config.mask_ratio == 0:
        raise ValueError(
            f"--predict {config.predict} with --mask-ratio 0 leaves nothing to predict: hide a share of the patches, "
            "such as 0.5, or use --predict visible."
        )
    if config.distil_steps and config.distil_epochs != type(config).distil_epochs:
        raise ValueError("--distil-steps and --distil-epochs were both given: give only one.")
    if config.predict != "visible" and config.decoder_blocks < config.distilled_blocks:
        raise ValueError(
            f"--decoder-blocks is {config.decoder_blocks}, and the tokens of the last {config.distilled_blocks} blocks "
            f"are to be predicted at hidden patches: use {config.distilled_blocks} or more, or --distilled-blocks 1."
        )
    check_source(config.teacher, is_vit=True)
    for name in filter(None, (config.arch, config.student)):
        check_vit_name(name)


def check_networks(config: Any, given: Network, precision: Chosen, device_type: str) -> None:
    """Refuse settings that do not fit the networks, before anything is written."""
    import torch

    from bigtrain.methods.defend.masks import visible_count
    from bigtrain.methods.defend.network import masked_student
    from bigtrain.models.architecture import check_blocks, check_image_size
    from bigtrain.models.attention import resolve_backend, torch_dtype
    from bigtrain.models.sanity import check_sees

    if config.tune:
        check_tuning(config, given)
    check_image_size((config.image_size, config.image_size), given.vit.patch_size)
    check_attention(config, given)
    check_sees(given, config.image_size)
    resolve_backend(config.attention, torch.device(device_type), torch_dtype(precision))
    with torch.device("meta"):
        student = masked_student(student_architecture(config, given), like=given.vit)
    check_pair(given.vit, student, config.distilled_blocks)
    if student.family.why_unmasked and config.mask_ratio > 0:
        kind, other = type(student.backbone).__name__, f"vit_small_patch{given.vit.patch_size}_224"
        raise ValueError(
            f"no patches of a {kind} as student can be hidden: {student.family.why_unmasked}. Give another --student, "
            f"such as {other}, or --mask-ratio 0."
        )
    if config.predict == "visible":
        return
    check_blocks("--decoder-blocks", config.decoder_blocks, student.backbone, "student")
    patches = math.prod(student.grid_size)
    if patches - visible_count(patches, config.mask_ratio) == 0 or patches < 2:
        raise ValueError(
            f"--mask-ratio {config.mask_ratio} hides none of the {patches} patches of a picture of {config.image_size} "
            f"pixels, and --predict {config.predict} needs some: hide more, or use --predict visible."
        )


def check_tuning(config: Any, given: Network) -> None:
    """Refuse sizes and blocks of dense tuning that do not fit the network."""
    from bigtrain.models.architecture import check_blocks, check_image_size

    for side in (config.image_size, config.crop_size):
        check_image_size((side, side), given.vit.patch_size)
    if given.vit.family.has_fixed_size and config.crop_size != config.image_size:
        raise ValueError(
            f"the relative positions of {given.architecture.model} belong to one size of pictures, and --image-size is "
            f"{config.image_size}, --crop-size {config.crop_size}: give both the same."
        )
    check_blocks("--tuned-blocks", config.tuned_blocks, given.vit.backbone, "teacher")
    check_attention(config, given)


def check_attention(config: Any, given: Network) -> None:
    """Refuse an attention backend where the blocks are timm's own."""
    if config.attention != "auto" and not given.vit.is_packed:
        raise ValueError(
            f"--attention {config.attention} is about packed blocks, and {given.architecture.model} has timm's own: "
            "leave it out."
        )


def check_pair(teacher: ViT, student: ViT, last: int) -> None:
    """Refuse a student whose tokens cannot be compared with the teacher's, block by block."""
    from bigtrain.models.architecture import check_blocks

    if teacher.patch_size != student.patch_size:
        raise ValueError(
            f"the teacher's patch size is {teacher.patch_size} and the student's {student.patch_size}; they must be "
            "equal."
        )
    for vit, of in ((teacher, "teacher"), (student, "student")):
        check_blocks("--distilled-blocks", last, vit.backbone, of)


def kept(config: Any) -> Keep:
    """Which patches the student sees, once "auto" is decided."""
    if config.keep == "auto":
        return "attended" if config.predict == "visible" else "random"
    return config.keep


def student_architecture(config: Any, given: Network) -> Architecture:
    from bigtrain.models.architecture import Architecture

    if config.student:
        return Architecture(config.student, config.image_size)
    return replace(given.architecture, image_size=config.image_size)
