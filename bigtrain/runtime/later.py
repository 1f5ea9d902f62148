"""Numbers on their way from the device, read some steps later, so that nothing waits for the device in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STEPS = 8  # how far a GPU may be behind when its numbers are read


class Later:
    """A copy of numbers under way.

    Args:
        numbers: single numbers; tensors may be on any one device.
    """

    def __init__(self, numbers: Mapping[str, Tensor | float]) -> None:
        self._known = {name: float(value) for name, value in numbers.items() if not isinstance(value, Tensor)}
        tensors = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
        self._order, self._names, self._event = list(numbers), list(tensors), None
        if not tensors:
            return
        together = torch.stack([value.detach().double().reshape(()) for value in tensors.values()])
        if together.device.type != "cuda":
            self._host = together
            return
        self._host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
        self._host.copy_(together, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> dict[str, float]:
        """All numbers, in the given order; waits for the device if they have not come yet."""
        if self._event is not None:
            self._event.synchronize()
        found = self._known | (dict(zip(self._names, self._host.tolist(), strict=True)) if self._names else {})
        return {name: found[name] for name in self._order}


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Whole numbers as a tensor, copied beside the device's work."""
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
