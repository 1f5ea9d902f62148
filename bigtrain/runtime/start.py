"""The start of a run: processes that know each other, a precision, a seed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from bigtrain.runtime import zero

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Chosen = Literal["fp32", "bf16", "fp16"]
BF16_FROM_WIDTH = 384  # ViT-S: below it a CPU is faster in fp32


def world_size_of_launch() -> int:
    """How many processes the launcher says there are, before any group forms."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def arguments_of_accelerate() -> list[str] | None:
    """What the `accelerate launch` right above this process was called with; None where there is none."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return None
    for place, (before, word) in enumerate(pairwise(words), 2):
        if word == "accelerate.commands.launch" or (word == "launch" and Path(before).name == "accelerate"):
            return words[place:]
    return None


def processes_asked_for() -> int:
    """How many processes accelerate was told to start; 1 where it was not told."""
    if (arguments := arguments_of_accelerate()) is None:
        return 1
    told, _ = launch_command_parser().parse_known_args(arguments)
    if told.num_processes is None and told.config_file:
        told.num_processes = load_config_from_file(told.config_file).num_processes
    return told.num_processes or 1


def check_launch() -> None:
    """Refuse, before any process group forms, a launch that cannot do what it says.

    Raises:
        ValueError: FSDP, DeepSpeed that would silently be off, or one process where several were asked for.
    """
    if "WORLD_SIZE" not in os.environ and (asked := processes_asked_for()) > 1:
        raise ValueError(
            f"accelerate was asked for {asked} processes and started one (it does so with --cpu, MULTI_CPU or too few "
            "GPUs): launch with --config_file recipes/accelerate/cpu2.yaml on a CPU, ddp.yaml on GPUs."
        )
    if is_on("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "this launch asks for FSDP, which is not supported (on CPUs Accelerate would silently run DDP): to share "
            "weights among processes launch with recipes/accelerate/zero3.yaml."
        )
    if zero.asked_for() and is_on("ACCELERATE_USE_CPU"):
        raise ValueError(
            "this launch asks for DeepSpeed and for ACCELERATE_USE_CPU (or --cpu), which would silently turn DeepSpeed "
            "off: leave the latter out; without a GPU DeepSpeed runs on the CPU by itself."
        )
    if zero.asked_for() and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "this launch asks for DeepSpeed and started no process group: launch with `accelerate launch "
            "--config_file recipes/accelerate/zero2.yaml RECIPE`."
        )


def start(
    precision: Chosen,
    *,
    timeout_min: float = 30.0,
    trackers: Sequence[str] = (),
    folder: Path | None = None,
    deterministic: bool = True,
) -> Accelerator:
    """Form the process group and choose the device.

    Args:
        timeout_min: a collective that waits for longer fails.
        deterministic: on a GPU too, where it costs some speed.
        trackers: of Accelerate, beside our own log; they keep their files in `folder`.

    Raises:
        ValueError: the launch cannot work as it is.
    """
    check_launch()
    for tracker in trackers:
        if find_spec(tracker) is None:  # Accelerate would leave it out without a word
            raise ValueError(f"--trackers {tracker} is not installed: `uv sync --extra {tracker}` does it.")
    # of torch, about its own and DeepSpeed's calls: nothing that a user could mend
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    backend = "gloo" if zero.asked_for() and not torch.cuda.is_available() else None
    # without saying so, several processes on a machine without a GPU would not know each other
    on_cpu = world_size_of_launch() > 1 and not torch.cuda.is_available() and not zero.asked_for()
    accelerator = Accelerator(  # no mixed precision of Accelerate's: see `autocast`
        step_scheduler_with_optimizer=False,
        mixed_precision="no",
        cpu=on_cpu,
        deepspeed_plugin=zero.plugin(precision) if zero.asked_for() else None,
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=timeout_min)),
        ],
    )
    if accelerator.device.type == "cuda" and deterministic:
        add_in_fixed_order()
    if accelerator.num_processes != world_size_of_launch():
        raise ValueError(
            f"the launcher started {world_size_of_launch()} processes, but they run as {accelerator.num_processes} "
            "that do not know each other. Launch with `accelerate launch --config_file recipes/accelerate/ddp.yaml "
            "RECIPE` on GPUs, with cpu2.yaml on a CPU."
        )
    if zero.asked_for() and not zero.is_used(accelerator):
        raise ValueError("this launch asks for DeepSpeed, and Accelerate has turned it off: see recipes/accelerate/.")
    return accelerator


def add_in_fixed_order() -> None:
    """Let CUDA use kernels that give the same bits each time; one that has no such form is an error of torch's.

    With a warning alone (`warn_only`) torch's attention would stay as it is.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass each


def is_on(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def autocast(accelerator: Accelerator, precision: Chosen) -> torch.autocast:
    """Mixed precision by torch alone, the same under DDP and DeepSpeed: weights stay float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(accelerator.device.type, dtype=dtype, enabled=precision != "fp32")


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


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank: drop path and dropout then need no generator state in a checkpoint."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2**63)
