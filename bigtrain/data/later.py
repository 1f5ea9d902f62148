"""Numbers on their way from the device, read some steps later, so that nothing waits for the device in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STEPS = 8  # how far a GPU may be behind when its numbers are read


class Arriving:
    """Copies of tensors under way from their device."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: to_host(tensor.detach()) for name, tensor in tensors.items()}
        self._event: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> dict[str, Tensor]:
        """The copies, on the CPU; waits for the device if they have not come yet."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class Later:
    """Single numbers, some of which may be under way."""

    def __init__(self, numbers: Mapping[str, Tensor | float]) -> None:
        tensors = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
        self._known = {name: float(value) for name, value in numbers.items() if not isinstance(value, Tensor)}
        self._order, self._names = list(numbers), list(tensors)
        together = [value.detach().double().reshape(()) for value in tensors.values()]
        self._arriving = Arriving({"numbers": torch.stack(together)} if together else {})

    def read(self) -> dict[str, float]:
        """All numbers, in the given order; waits for the device if they have not come yet."""
        arrived = self._arriving.read()
        values = arrived["numbers"].tolist() if arrived else []
        found = self._known | dict(zip(self._names, values, strict=True))
        return {name: found[name] for name in self._order}


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a GPU's tensor that is there once an event recorded after it has passed; others as they are."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Whole numbers as a tensor, copied beside the device's work."""
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
