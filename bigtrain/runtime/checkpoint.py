"""Checkpoints: a folder `step-000123` that is there whole or not at all; the newest whole one wins.

Portable: weights, optimizer moments and any other state lie by name in safetensors, whole, and load at any world size
and under any way to launch (DDP, DeepSpeed ZeRO 1, 2 and 3). state.json holds a checksum of each file.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bigtrain.files import remove_unfinished, temporary_for, whole_folder
from bigtrain.runtime import zero
from bigtrain.runtime.exit import at_end
from bigtrain.runtime.tensor_file import write_tensors

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
Tensors = dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one stage of a run. All methods are called on all ranks.

    Args:
        folder: where they lie, e.g. RUN/checkpoints/distil; on a file system that all nodes share.
        trained: the trained module, not prepared.
        optimizer: of that module, not prepared.
        state: all that is kept, where that is more than `trained`, which is then a part of it.
        keep: how many of the newest stay.
        keep_every: those of every so many steps stay too; 0: none.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        state: nn.Module | None = None,
        keep: int = 2,
        keep_every: int = 0,
    ) -> None:
        self.folder, self.accelerator, self.keep, self.keep_every = folder, accelerator, keep, keep_every
        self.trained, self.optimizer, self.state = trained, optimizer, state or trained
        (path,) = (name for name, module in self.state.named_modules() if module is trained)
        self._prefix = path + "." if path else ""
        name_of = {parameter: self._prefix + name for name, parameter in trained.named_parameters()}
        self._names = [name_of[p] for group in optimizer.param_groups for p in group["params"]]
        self._moments: Tensors = {}
        self._copies: dict[str, Tensors] = {}
        self._writer: Thread | None = None
        self._whole: deque[tuple[int, float]] = deque()
        self._problem = ""

    @property
    def newest(self) -> Path | None:
        return whole[-1] if (whole := self._complete()) else None

    def load(self) -> dict[str, Any]:
        """Load the newest whole checkpoint into the module, before it is prepared; empty if there is none.

        Returns:
            What `save` was given, with its step.

        Raises:
            ValueError: it is of another network.
            OSError: this rank cannot read what rank 0 could.
        """
        chosen: list[str | None] = [None]
        if self.accelerator.is_main_process:
            remove_unfinished(self.folder, "step-*")
            chosen = [self._newest_whole()]
        broadcast_object_list(chosen)
        if chosen[0] is None:
            return {}
        folder = self.folder / chosen[0]
        try:
            state = json.loads((folder / STATE_FILE).read_text())
            weights, self._moments = load_file(folder / MODEL_FILE), load_file(folder / OPTIMIZER_FILE)
        except (OSError, SafetensorError, ValueError) as error:
            raise OSError(
                f"rank {self.accelerator.process_index} cannot read {folder} ({error}): the run folder must lie on a "
                "file system that all nodes share."
            ) from error
        check_fits(folder, weights, self.state.state_dict())
        self.state.load_state_dict(weights)
        self.accelerator.print(f"continuing from {folder}")
        del state["checksums"]
        return state

    def load_moments(self, prepared: nn.Module) -> None:
        """Give the optimizer the moments that `load` found, once the module is prepared."""
        moments: dict[str, Tensors] = {}
        for key, tensor in self._moments.items():
            name, _, kind = key.rpartition("/")
            moments.setdefault(name, {})[kind] = tensor
        self._moments = {}
        if zero.is_used(self.accelerator):
            zero.set_moments(prepared, {name.removeprefix(self._prefix): kinds for name, kinds in moments.items()})
            return
        number_of = {name: number for number, name in enumerate(self._names)}
        state = {number_of[name]: kinds for name, kinds in moments.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def weights(self, prepared: nn.Module) -> Tensors:
        """All weights by name, whole, on every rank."""
        if not zero.is_used(self.accelerator):
            return self.state.state_dict()
        trained = {self._prefix + name: value for name, value in zero.whole_weights(prepared).items()}
        others = self.state.state_dict() if self._prefix else {}
        return trained | {key: value for key, value in others.items() if not key.startswith(self._prefix)}

    def save(self, step: int, state: Mapping[str, Any], prepared: nn.Module) -> None:
        """Copy everything to memory of rank 0, where a thread writes, flushes and renames it, then removes the oldest.

        Raises:
            OSError: an earlier one could not be written; the checkpoints before it are as they were.
        """
        began = time.monotonic()
        self.settle()
        weights, moments = self.weights(prepared), self._all_moments(prepared)
        if not self.accelerator.is_main_process:
            return
        files = {MODEL_FILE: self._copied(MODEL_FILE, weights), OPTIMIZER_FILE: self._copied(OPTIMIZER_FILE, moments)}
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        waited_s = time.monotonic() - began
        self._writer = Thread(target=self._write, args=(step, dict(state), files, waited_s), name="checkpoint")
        self._writer.start()  # no daemon: a process that ends in good order waits for it ...
        at_end.callback(self._writer.join)  # ... before it releases the run folder's lock

    def settle(self) -> None:
        """Wait until the checkpoint under way is whole. Called on all ranks.

        Raises:
            OSError: it could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        problem, self._problem = [self._problem], ""
        broadcast_object_list(problem)  # the others wait here
        if problem[0]:
            raise OSError(problem[0])

    def newly_whole(self) -> list[tuple[int, float]]:
        """The checkpoints that have been written since this was last asked: their steps, and how many seconds training
        waited for each."""
        found = []
        while self._whole:
            found.append(self._whole.popleft())
        return found

    def _copied(self, file: str, tensors: Tensors) -> Tensors:
        """Copies in memory that is used again by each save: training changes the originals meanwhile."""
        on_gpu = self.accelerator.device.type == "cuda"
        copies = self._copies.setdefault(file, {})
        for name in copies.keys() - tensors.keys():
            del copies[name]
        for name, tensor in tensors.items():
            copy = copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copies[name] = copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            copy.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, step: int, state: Mapping[str, Any], files: Mapping[str, Tensors], waited_s: float) -> None:
        """In the thread."""
        try:
            self._write_whole(step, state, files)
            self._whole.append((step, waited_s))
        except Exception as error:  # of a thread, whose traceback nobody would see
            before = f"{self.newest} is as it was" if self.newest else "there is none before it"
            self._problem = (
                f"the checkpoint of step {step} cannot be written ({error}); {before}. Make room in "
                f"{self.folder}, and run the same command: it continues."
            )

    def _write_whole(self, step: int, state: Mapping[str, Any], files: Mapping[str, Tensors]) -> None:
        final = self.folder / f"step-{step:06d}"
        if final.exists():
            if not damage(final):
                return
            self._remove(final)  # it was passed over, and now the step comes again
        with whole_folder(final, "durable") as folder:
            checksums = {name: write_tensors(folder / name, tensors) for name, tensors in files.items()}
            (folder / STATE_FILE).write_text(json.dumps({"step": step, **state, "checksums": checksums}))
        older = [path for path in self._complete() if step_of(path) < step]  # a newer one was passed over as damaged
        for old in older[: max(0, len(older) + 1 - self.keep)]:
            if not self.keep_every or step_of(old) % self.keep_every:
                self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        going = temporary_for(checkpoint)  # renamed first: half of it must not look whole
        shutil.rmtree(going, ignore_errors=True)
        checkpoint.rename(going)
        shutil.rmtree(going)

    def _complete(self) -> list[Path]:
        found = [p for p in self.folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]  # no step-000123.tmp
        return sorted(found, key=step_of)  # above 999999 there are 7 digits

    def _newest_whole(self) -> str | None:
        for folder in reversed(self._complete()):
            if not (why := damage(folder)):
                return folder.name
            print(f"checkpoint {folder} is not whole ({why}); using the one before it.", flush=True)
        return None

    def _all_moments(self, prepared: nn.Module) -> Tensors:
        if zero.is_used(self.accelerator):
            return {self._prefix + key: value for key, value in zero.moments(prepared).items()}
        tensors = {}
        for number, state in self.optimizer.state_dict()["state"].items():
            for kind, value in state.items():
                if value is not None:
                    tensors[f"{self._names[number]}/{kind}"] = torch.as_tensor(value)
        return tensors


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def damage(checkpoint: Path) -> str:
    """Why a checkpoint is damaged; empty if it is whole."""
    try:
        for name, expected in json.loads((checkpoint / STATE_FILE).read_text())["checksums"].items():
            if checksum(checkpoint / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_fits(checkpoint: Path, given: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Refuse weights of another network, naming shapes."""
    there = {name: tuple(tensor.shape) for name, tensor in given.items()}
    here = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    differ = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differ:
        pairs = "; ".join(f"{n} is {there.get(n, 'not there')}, here {here.get(n, 'not')}" for n in differ[:3])
        raise ValueError(
            f"{checkpoint} is of another network: {pairs}{'; ...' if differ[3:] else ''}. Was the teacher's file "
            "replaced since? Give the one it was trained with, or name a new folder."
        )


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
