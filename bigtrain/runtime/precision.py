"""What a run computes in, and on which kind of device."""

from __future__ import annotations

from typing import Literal

import torch

from bigtrain.choices import Chosen, Precision
from bigtrain.runtime.launch import is_on


def device_type() -> Literal["cuda", "cpu"]:
    """The kind of device that `start` will choose."""
    return "cuda" if torch.cuda.is_available() and not is_on("ACCELERATE_USE_CPU") else "cpu"


def choose_precision(precision: Precision) -> Chosen:
    """What "auto" means here: bf16 on CUDA (fp16 where the GPU lacks it), fp32 on a CPU.

    fp32 on any CPU, so that the same settings give the same figures with any launcher and on any machine.
    Where it has bf16 instructions, --precision bf16 is faster from ViT-S up (tests/benchmarks/README.md).

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
    return "fp32"
