"""Checkpoints: a folder `step-000123` that is there whole or not at all; the newest one wins.

Portable: weights, optimizer moments and any other state lie by name in safetensors, and load at any world size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"


class Checkpoints:
    """The checkpoints of one stage of a run.

    Args:
        folder: where they lie, e.g. RUN/checkpoints/distil.
        module: the trained module, not wrapped; further tensors to keep belong into its buffers.
        optimizer: of that module.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 2
    ) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        self.module, self.optimizer = module, optimizer
        name_of = {parameter: name for name, parameter in module.named_parameters()}
        self._names = [name_of[p] for group in optimizer.param_groups for p in group["params"]]

    def save(self, step: int, state: Mapping[str, int]) -> None:
        """Write, flush, rename, then remove the oldest; rank 0 does it, the others wait."""
        if self.accelerator.is_main_process:
            final = self.folder / f"step-{step:06d}"
            temporary = self.folder / f"step-{step:06d}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file({k: v.contiguous().cpu() for k, v in self.module.state_dict().items()}, temporary / MODEL_FILE)
            save_file(self._optimizer_tensors(), temporary / OPTIMIZER_FILE)
            scaler = {"scaler": self.accelerator.scaler.state_dict()} if self.accelerator.scaler else {}  # of fp16
            (temporary / STATE_FILE).write_text(json.dumps({"step": step, **state, **scaler}))
            for file in [*temporary.iterdir(), temporary]:
                _fsync(file)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _fsync(self.folder)
            for old in self._whole()[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self) -> dict[str, int]:
        """Load the newest whole checkpoint into module and optimizer; empty if there is none.

        Returns:
            What `save` was given, with its step."""
        for folder in reversed(self._whole()):
            try:
                state = json.loads((folder / STATE_FILE).read_text())
                weights, moments = load_file(folder / MODEL_FILE), load_file(folder / OPTIMIZER_FILE)
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                self.accelerator.print(f"checkpoint {folder} is not whole ({error}); the one before it is taken.")
                continue
            self.module.load_state_dict(weights)
            self._load_optimizer(moments)
            if (scaler := state.pop("scaler", None)) and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(scaler)
            self.accelerator.print(f"continuing from {folder}")
            return state
        return {}

    def _whole(self) -> list[Path]:
        step_of = {p: p.name.removeprefix("step-") for p in self.folder.glob("step-*")}
        whole = [p for p, step in step_of.items() if step.isdigit()]  # not step-000123.tmp
        return sorted(whole, key=lambda p: int(step_of[p]))  # behind 999999 there are 7 digits

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for number, state in self.optimizer.state_dict()["state"].items():
            for kind, value in state.items():
                if value is not None:
                    tensors[f"{self._names[number]}/{kind}"] = torch.as_tensor(value).contiguous().cpu().clone()
        return tensors

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Any]] = {}
        number_of = {name: number for number, name in enumerate(self._names)}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition("/")
            state.setdefault(number_of[name], {})[kind] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
