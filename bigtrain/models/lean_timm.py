"""timm and torchvision, imported without torch's compiler and wandb, which take half of the time.

    from bigtrain.models.lean_timm import timm

Neither is needed to load or run a network: torchvision asks the compiler, at import, for a function that tells whether
a device can be compiled for; timm keeps it away from some methods of NaFlexViT, and looks for wandb to log to. Whatever
trains or compiles imports the compiler by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo.utils"


def is_compile_supported(device_type: str) -> bool:
    """The compiler's own answer, once somebody asks."""
    from torch._dynamo.utils import is_compile_supported as answer

    return answer(device_type)


def disable_at_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, but it imports the compiler only if something else already has."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        is_compiling = "torch._dynamo" in sys.modules
        return (torch.compiler.disable(function) if is_compiling else function)(*arguments, **options)

    return run


@contextmanager
def without_compiler_and_wandb() -> Iterator[None]:
    stand_in = ModuleType(COMPILER)
    stand_in.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    modules = {COMPILER: stand_in, "wandb": None}  # None: the import system then says that there is none
    put = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(put)  # type: ignore[arg-type]
    disable = torch.compiler.disable
    torch.compiler.disable = disable_at_call  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compiler.disable = disable
        for name in put:
            del sys.modules[name]


with without_compiler_and_wandb():
    import timm
    import torchvision

__all__ = ["timm", "torchvision"]
