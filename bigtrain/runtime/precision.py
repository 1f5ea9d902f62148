"""What a run computes in, and on which kind of device."""

from __future__ import annotations

from typing import Literal

import torch

from bigtrain.choices import Chosen, Precision
from bigtrain.runtime.launch import is_on

BF16_FROM_WIDTH = 384  # ViT-S: below it a CPU is faster in fp32


def autocast(device: torch.device, precision: Chosen) -> torch.autocast:
    """Mixed precision by torch alone, the same under DDP and DeepSpeed: weights stay float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def device_type() -> Literal["cuda", "cpu"]:
    """The kind of device that `start` will choose."""
    return "cuda" if torch.cuda.is_available() and not is_on("ACCELERATE_USE_CPU") else "cpu"


def choose_precision(precision: Precision, width: int) -> Chosen:
    """What "auto" means here: bf16 on CUDA, and on a CPU with bf16 instructions from ViT-S up; else fp32.

    A rule, not a measurement, so that a restart chooses the same.

    Raises:
        ValueError: this device lacks the one that was asked for.
    """
    on_gpu = device_type() == "cuda"
    if precision == "fp16" and not on_gpu:
        raise ValueError("--precision fp16 needs a GPU, and there is none here: use fp32, bf16 or auto.")
    if precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"--precision bf16 is not supported by {torch.cuda.get_device_name()}: use fp16, fp32 or auto."
        )
    if precision != "auto":
        return precision
    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 and width >= BF16_FROM_WIDTH else "fp32"
