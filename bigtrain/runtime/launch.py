"""How this process was started, and by what: before any process group forms."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path

from bigtrain.choices import Workers
from bigtrain.data.plan import check_divides

PARENT = os.getppid()
PR_SET_PDEATHSIG = 1
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a control group, such as a container's
# how many processes a scheduler or MPI has started this one among
STARTED_AMONG = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def world_size_of_launch() -> int:
    """How many processes the launcher says there are, before any group forms."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def arguments_of_accelerate() -> list[str] | None:
    """What the `accelerate launch` right above this process was called with; None where there is none."""
    try:
        words = Path(f"/proc/{PARENT}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return None
    for place, word in enumerate(words):
        name, before = Path(word).name, Path(words[place - 1]).name
        if name in ("accelerate-launch", "accelerate.commands.launch") or (name == "launch" and before == "accelerate"):
            return words[place + 1 :]
    return None


def processes_asked_for() -> int:
    """How many processes accelerate was told to start; 1 if it was not used."""
    if (arguments := arguments_of_accelerate()) is None:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    flags, _ = launch_command_parser().parse_known_args(arguments)
    has_default = Path(default_config_file).is_file() and not flags.cpu
    if flags.num_processes is None and (flags.config_file or has_default):
        flags.num_processes = load_config_from_file(flags.config_file).num_processes
    return flags.num_processes or 1


def expects_gpus() -> bool:
    """Whether accelerate's configuration is for several GPUs, and not for a CPU."""
    if (arguments := arguments_of_accelerate()) is None:
        return False
    named = [after for word, after in pairwise([*arguments, ""]) if word == "--config_file"]
    named += [word.partition("=")[2] for word in arguments if word.startswith("--config_file=")]
    if not named or "--cpu" in arguments or not Path(named[0]).is_file():
        return False
    import yaml  # of accelerate's files

    try:
        asked = yaml.safe_load(Path(named[0]).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # accelerate has refused it
    return isinstance(asked, dict) and asked.get("distributed_type") == "MULTI_GPU" and not asked.get("use_cpu")


def has_gpu() -> bool:
    """Whether torch would find a GPU; imports no torch where there is no driver at all."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists() and sys.platform == "linux":
        return False
    import torch

    return torch.cuda.is_available()


def threads_of_process() -> int:
    """CPU threads for each process of this machine: its share of the cores that are ours, or OMP_NUM_THREADS."""
    if given := os.environ.get("OMP_NUM_THREADS", ""):
        return int(given) if given.isdigit() and int(given) else 1
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def workers_of_process(asked: Workers, *, on_gpu: bool) -> int:
    """How many processes read and decode for each process of this machine."""
    if asked != "auto":
        return int(asked)
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, share - 1)) if on_gpu else min(4, share // 4)


def cores() -> int:
    """The cores that this process may use: by affinity, and by the quota of its control group (a container's)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(available, int(quota) // int(period)))
    except (OSError, ValueError):  # no such group, or "max"
        return available


def asks_for_deepspeed() -> bool:
    """Whether the launcher's configuration asks for DeepSpeed."""
    return is_on("ACCELERATE_USE_DEEPSPEED")


def zero_stage() -> int:
    """The stage of ZeRO that the launcher's configuration asks for; 0: none, with or without DeepSpeed."""
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if asks_for_deepspeed() else 0


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
    if expects_gpus() and not has_gpu():
        raise ValueError(
            "this launch is for GPUs, and this machine has none that works (nvidia-smi says more): launch with "
            "--config_file recipes/accelerate/cpu.yaml, or cpu2.yaml."
        )
    among = next((name for name in STARTED_AMONG if int(os.environ.get(name) or 1) > 1), None)
    if "WORLD_SIZE" not in os.environ and among:
        raise ValueError(
            f"{os.environ[among]} processes were started ({among}) that do not know each other: each needs RANK, "
            "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or let accelerate launch or torchrun start them."
        )
    if is_on("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "this launch asks for FSDP, which is not supported (on CPUs Accelerate would silently run DDP): to share "
            "weights among processes launch with recipes/accelerate/zero3.yaml."
        )
    if asks_for_deepspeed() and is_on("ACCELERATE_USE_CPU"):
        raise ValueError(
            "this launch asks for DeepSpeed and for ACCELERATE_USE_CPU (or --cpu), which would silently turn DeepSpeed "
            "off: leave the latter out; without a GPU DeepSpeed runs on the CPU by itself."
        )
    if asks_for_deepspeed() and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "this launch asks for DeepSpeed and started no process group: launch with `accelerate launch "
            "--config_file recipes/accelerate/zero2.yaml RECIPE`."
        )


def check_batch(global_batch: int, accumulate: int) -> None:
    """Refuse a batch that does not divide among the launched processes, and each one's parts."""
    share = global_batch // check_divides(global_batch, world_size_of_launch())
    if share % accumulate:
        allowed = [str(parts) for parts in range(1, share + 1) if share % parts == 0]
        raise ValueError(
            f"--accumulate {accumulate} does not divide each process's share of a batch, {share} images: use "
            f"{', '.join(allowed[:-1])}{' or ' if allowed[:-1] else ''}{allowed[-1]}."
        )


def check_moving_average(flags: str) -> None:
    """Refuse a moving average of weights where no process has them whole."""
    if zero_stage() == 3:
        raise ValueError(
            f"a moving average ({flags}) needs whole weights, which ZeRO-3 shares out among the processes: launch with "
            "recipes/accelerate/zero2.yaml, or leave it out."
        )


def is_on(variable: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def stop_with_launcher() -> None:
    """Have the system send SIGTERM when the launcher dies (`kill` of accelerate, SIGUSR1 to torchrun): without it the
    run would go on with nobody above it. A shell or a scheduler that started the recipe itself may go."""
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or is_on("BIGTRAIN_LAUNCHED")
    is_launched |= arguments_of_accelerate() is not None
    if sys.platform == "linux" and is_launched:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != PARENT:  # it has gone meanwhile
            os.kill(os.getpid(), signal.SIGTERM)
