"""Numbers that are read later."""

import pytest
import torch

from bigtrain.data.later import Arriving, Later, on_device


def test_numbers_in_order():
    """Tensors and known numbers come back in the given order, as floats."""
    found = Later({"loss": torch.tensor(1.5), "lr": 0.1, "problem": torch.tensor(2), "taken": True}).read()
    assert list(found.items()) == [("loss", 1.5), ("lr", 0.1), ("problem", 2.0), ("taken", 1.0)]


def test_no_tensors():
    """Without tensors there is nothing to wait for."""
    assert Later({"lr": 0.1}).read() == {"lr": 0.1} and Later({}).read() == {} and Arriving({}).read() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_without_waiting():
    """On a GPU nothing waits until the numbers are read, and they are those of the time they were noted."""
    value = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        later = [Later({"value": value * step, "step": step}) for step in range(20)]
        value.add_(on_device([1], value.device)[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [each.read()["value"] for each in later] == list(range(20))
