"""Files of tensors that safetensors reads."""

import pytest
import torch
from safetensors.torch import load_file

from bigtrain.runtime.checkpoint import checksum
from bigtrain.runtime.tensor_file import NAMES, write_tensors


@pytest.mark.parametrize("block_bytes", [5, 1 << 24])
def test_read_by_safetensors(tmp_path, monkeypatch, block_bytes):
    """Every kind of number, single numbers and empty tensors come back as they were, with the file's checksum."""
    monkeypatch.setattr("bigtrain.runtime.tensor_file.BLOCK_BYTES", block_bytes)
    tensors = {f"a.{name}": (torch.rand(3, 5) * 100).to(dtype) for dtype, name in NAMES.items()}
    tensors |= {
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "é": torch.arange(7),
        "byte": torch.tensor([1], dtype=torch.uint8),
    }
    path = tmp_path / "file.safetensors"
    assert write_tensors(path, tensors) == checksum(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_no_tensors(tmp_path):
    """A file may hold none, as the moments of an optimizer that keeps none."""
    assert write_tensors(tmp_path / "none", {}) == checksum(tmp_path / "none")
    assert load_file(tmp_path / "none") == {}
