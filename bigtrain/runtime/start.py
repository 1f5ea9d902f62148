"""The start of a run: processes that know each other, a precision, a seed."""

from __future__ import annotations

import os
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

Precision = Literal["auto", "fp32", "bf16", "fp16"]
BF16_FROM_WIDTH = 384  # ViT-S: below it a CPU is faster in fp32


def world_size_of_launch() -> int:
    """How many processes the launcher says there are, before any group forms."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(precision: Literal["fp32", "bf16", "fp16"]) -> Accelerator:
    """Form the process group and choose the device.

    Raises:
        ValueError: the launch cannot work as it is.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError("this recipe does not run under DeepSpeed yet: launch it with DDP (--multi_gpu).")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != world_size_of_launch():
        raise ValueError(
            f"the launcher started {world_size_of_launch()} processes, but they run as {accelerator.num_processes} "
            "that do not know each other. On CPUs launch with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 "
            "RECIPE`, on GPUs with `accelerate launch --multi_gpu RECIPE`."
        )
    return accelerator


def device_type() -> Literal["cuda", "cpu"]:
    """The kind of device that `start` will choose."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    return "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"


def choose_precision(precision: Precision, width: int) -> Literal["fp32", "bf16", "fp16"]:
    """What "auto" means here: bf16 on CUDA, and on a CPU with bf16 instructions from ViT-S up; else fp32.

    A rule, not a measurement, so that a restart chooses the same.
    """
    if precision != "auto":
        return precision
    if device_type() == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 and width >= BF16_FROM_WIDTH else "fp32"


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank: drop path and dropout then need no generator state in a checkpoint."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2**63)
