"""The start of a run: processes that know each other, and the seed of a step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed import DistNetworkError

from bigtrain.choices import Chosen
from bigtrain.runtime import zero
from bigtrain.runtime.launch import asks_for_deepspeed, check_launch, world_size_of_launch
from bigtrain.runtime.trackers import check_installed

MEETING_S = 30.0  # longer than processes of one launch usually take to find each other


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
    check_installed(trackers)
    # torch's, about its own and DeepSpeed's calls: nothing a user could fix
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    backend = "gloo" if asks_for_deepspeed() and not torch.cuda.is_available() else None
    # without it, several processes on a machine without a GPU would form no group
    on_cpu = world_size_of_launch() > 1 and not torch.cuda.is_available() and not asks_for_deepspeed()
    with port_errors(), meeting():
        accelerator = Accelerator(  # no mixed precision of Accelerate's: see `Setup.autocast`
            step_scheduler_with_optimizer=False,
            mixed_precision="no",
            cpu=on_cpu,
            deepspeed_plugin=zero.plugin(precision) if asks_for_deepspeed() else None,
            log_with=list(trackers) or None,
            project_dir=folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=timeout_min)),
            ],
        )
    if accelerator.num_processes != world_size_of_launch():
        raise ValueError(
            f"the launcher started {world_size_of_launch()} processes, but they run as {accelerator.num_processes} "
            "that do not know each other. Launch with `accelerate launch --config_file recipes/accelerate/ddp.yaml "
            "RECIPE` on GPUs, with cpu2.yaml on a CPU."
        )
    if asks_for_deepspeed() and not zero.is_used(accelerator):
        raise ValueError("this launch asks for DeepSpeed, and Accelerate has turned it off: see recipes/accelerate/.")
    if accelerator.device.type == "cuda" and deterministic:
        add_in_fixed_order()
    return accelerator


@contextmanager
def port_errors() -> Iterator[None]:
    """A sentence where the port at which the processes are to meet is in use."""
    try:
        yield
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"another program listens at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}, where the "
            "processes of this launch are to meet: choose another port (MASTER_PORT, or --main_process_port of "
            "accelerate); a job of SLURM gets another one when it is submitted again."
        ) from error


@contextmanager
def meeting() -> Iterator[None]:
    """While the processes of a launch find each other: say so where it takes long; Ctrl-C ends this one at once."""
    if world_size_of_launch() == 1:
        yield
        return
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    message = (
        f"rank {os.environ.get('RANK')} has waited {MEETING_S:.0f} s for all {world_size_of_launch()} processes to "
        f"meet at {address}: has one ended, or is that address unreachable?"
    )
    timer = threading.Timer(MEETING_S, lambda: print(message, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the others too
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        timer.cancel()


def add_in_fixed_order() -> None:
    """Make CUDA use deterministic kernels; torch raises an error for an operation that has none.

    With `warn_only` torch's attention would stay nondeterministic.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass each


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank: drop path and dropout then need no generator state in a checkpoint."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2**63)
