"""Whether torch.compile pays, and how it is set: the same random numbers as without it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from bigtrain.choices import Compile

if TYPE_CHECKING:  # a mistake is reported without it
    import torch

NO_COMPILER = "there is no C compiler on the PATH"
FEWEST_STEPS = 1000  # that make up for half a minute of compiling or more


def compile_pays(asked: Compile, device: torch.device, steps: int) -> bool:
    """Whether the networks of a stage are compiled.

    Args:
        steps: of the whole stage, so that a run that goes on is compiled as it was.
    """
    if asked == "auto":
        return device.type == "cuda" and steps >= FEWEST_STEPS and why_not(device) == ""
    if asked == "on" and (why := why_not(device)):
        raise ValueError(f"--compile on was asked for, and {why}: use --compile auto, or off.")
    return asked == "on"


def check_compiler(asked: Compile) -> None:
    """Refuse --compile on where nothing can be compiled, before a run begins."""
    if asked == "on" and not has_compiler():
        raise ValueError(f"--compile on was asked for, and {NO_COMPILER}: use --compile auto, or off.")


def has_compiler() -> bool:
    return any(map(shutil.which, ("cc", "gcc", "g++", "clang")))


def why_not(device: torch.device) -> str:
    """What compiling lacks here; empty if nothing."""
    if not has_compiler():
        return NO_COMPILER
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton does not work with this GPU"
    return ""


def prepare_compiling(asked: Compile) -> None:
    """Drops of paths come from the same generator as without compiling; where nobody asked for it, what cannot be
    compiled runs as it is."""
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.fallback_random = True
    torch._dynamo.config.suppress_errors = asked == "auto"
