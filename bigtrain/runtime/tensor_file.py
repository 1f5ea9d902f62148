"""A .safetensors file written by a thread beside training: unlike the library's own writer, which copies each tensor to
bytes and writes them with Python's lock held, so that a GPU waits for its next kernels meanwhile. The library reads it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
BLOCK_BYTES = 1 << 24  # without Python's lock


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write contiguous tensors of the CPU, those of the widest numbers first, so that all are aligned.

    Returns:
        CRC-32 of the file.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = len(encoded).to_bytes(8, "little") + encoded
    value = zlib.crc32(head)
    with path.open("wb", buffering=0) as file:
        file.write(head)
        for _, tensor in ordered:
            payload = tensor.reshape(-1).view(torch.uint8).numpy().data
            for first in range(0, len(payload), BLOCK_BYTES):
                block = payload[first : first + BLOCK_BYTES]
                value = zlib.crc32(block, value)
                while block:
                    block = block[file.write(block) :]
    return value
