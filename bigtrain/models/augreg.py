"""AugReg's files of weights (Steiner et al. 2021): .npz arrays from JAX."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

AUGREG_BLOCK = {
    "LayerNorm_0": "norm1",
    "LayerNorm_2": "norm2",
    "MlpBlock_3/Dense_0": "mlp.fc1",
    "MlpBlock_3/Dense_1": "mlp.fc2",
    "MultiHeadDotProductAttention_1/out": "attn.proj",
}
AUGREG_TOP = {
    "embedding": "patch_embed.proj",
    "Transformer/encoder_norm": "norm",
    "head": "head",
    "pre_logits": "pre_logits.fc",
}


def from_augreg(path: Path) -> dict[str, Tensor]:
    """The arrays of an AugReg .npz (Steiner et al. 2021, from JAX) under timm's names and in torch's layouts.

    Kernels become (out, in), or (out, in, h, w) for the patches; the heads' axes are flattened, and query, key and
    value stacked to qkv. A name that is not AugReg's is kept as it is, so that loading reports it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key.removeprefix("params/"): torch.from_numpy(np.asarray(file[key])) for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz of plain arrays ({error}).") from error
    state: dict[str, Tensor] = {}
    qkv: dict[str, list[Tensor | None]] = {}
    for key, array in arrays.items():
        layer, _, leaf = key.rpartition("/")
        kind = {"kernel": "weight", "scale": "weight", "bias": "bias"}.get(leaf, "")
        block = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", layer)
        attended = re.fullmatch(r"MultiHeadDotProductAttention_1/(query|key|value)", block[2]) if block else None
        if block and attended and kind:
            target = qkv.setdefault(f"blocks.{block[1]}.attn.qkv.{kind}", [None, None, None])
            flat = array.reshape(array.shape[0], -1).T if kind == "weight" else array.flatten()
            target[("query", "key", "value").index(attended[1])] = flat
        elif block and kind and block[2] in AUGREG_BLOCK:
            if block[2].endswith("/out") and kind == "weight":
                array = array.reshape(-1, array.shape[-1])
            state[f"blocks.{block[1]}.{AUGREG_BLOCK[block[2]]}.{kind}"] = _torch_layout(array)
        elif layer in AUGREG_TOP and kind:
            state[f"{AUGREG_TOP[layer]}.{kind}"] = _torch_layout(array)
        else:
            state[{"cls": "cls_token", "Transformer/posembed_input/pos_embedding": "pos_embed"}.get(key, key)] = array
    for key, parts in qkv.items():
        state[key] = torch.cat([part for part in parts if part is not None])
    return state


def _torch_layout(array: Tensor) -> Tensor:
    """Move the output axis of a JAX kernel first: (in, out) -> (out, in), (h, w, in, out) -> (out, in, h, w)."""
    return {2: lambda: array.T, 4: lambda: array.permute(3, 2, 0, 1)}.get(array.ndim, lambda: array)().contiguous()
