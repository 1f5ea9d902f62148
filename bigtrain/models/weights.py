"""Files of weights: .safetensors of ours and of others, .pth (weights only), AugReg .npz; matched key by key.

Every load accounts for every key: a missing or unexpected one is an error, except the pretraining
task's classifier, which is left out and reported.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from bigtrain.files import whole_file
from bigtrain.models.lean_timm import timm

ABOUT = "bigtrain"  # key of the metadata
AVERAGES = ("state_dict_ema", "model_ema", "ema")  # of timm, DeiT and ConvNeXt, DINO and others
RAW = ("state_dict", "model", "teacher")
CLASSIFIER = re.compile(r"(head|head_dist|pre_logits|fc_norm|attn_pool)(\.|$)")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a .safetensors file under a temporary name, flush it to disk, then rename it; same input, same bytes.

    `about` becomes one JSON entry of the metadata: the format does not keep the order of several.
    """
    with whole_file(path) as file:  # safetensors' own save_file makes files that only their owner can read
        file.write(serialize(dict(tensors), metadata={ABOUT: json.dumps(about)}))


def load_matching(module: nn.Module, state: Mapping[str, Tensor], source: str, classifier: str = "head") -> str:
    """Copy weights into a module, key by key, as float32; a classifier the module lacks is left out.

    Args:
        classifier: its name in this network, beside those of a ViT's.

    Returns:
        A line: how many keys matched, which were left out.

    Raises:
        ValueError: a key is missing or unexpected, or a shape differs.
    """
    own = module.state_dict()
    left_out = sorted(
        key for key in state if key not in own and (CLASSIFIER.match(key) or key.startswith(f"{classifier}."))
    )
    missing = sorted(key for key in own if key not in state)
    unexpected = sorted(key for key in state if key not in own and key not in left_out)
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        wrong = [
            f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(
            f"{source} does not fit the network: {len(own) - len(missing)} keys match, {'; '.join(wrong)}. "
            "Name the network these weights belong to with --arch."
        )
    if broken := [key for key in own if state[key].is_floating_point() and not bool(state[key].isfinite().all())]:
        raise ValueError(
            f"{source} has weights that are NaN or infinite ({', '.join(broken[:4])}{', ...' if broken[4:] else ''}): "
            "take an earlier checkpoint of its training."
        )
    module.load_state_dict({key: state[key].float() for key in own})
    rest = f", left out: {', '.join(left_out)} (the pretraining task's classifier)" if left_out else ""
    return f"{len(own)} keys matched, none missing or unexpected{rest}"


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a .safetensors file, and what `save_tensors` wrote about them; nothing for files of others."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118 (file is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): give a whole .safetensors file.") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a .pth, read without running code in it, or of an AugReg .npz; and what is to be said of them.

    Where a moving average of the weights lies beside the raw ones, it is taken: it is what training made it for.
    """
    if path.suffix == ".npz":
        return from_augreg(path), ""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read without running code in it ({type(error).__name__}): save its state_dict of "
            "tensors alone, as .pth or .safetensors."
        ) from error
    said = ""
    for wrapper in (*AVERAGES, *RAW):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            is_state = all(isinstance(value, Tensor) for value in state[wrapper].values())
            if wrapper in AVERAGES and not is_state:
                continue  # a decay beside it, say
            others = [key for key in RAW if wrapper in AVERAGES and isinstance(state.get(key), dict)]
            if others:
                said = f"; the moving average {wrapper} is taken, not the raw weights {others[0]} beside it"
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict: save the tensors of a network by name.")
    for prefix in ("module.", "backbone."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state, said


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors of a file of weights, what bigtrain wrote about them, and what is to be said of them."""
    if path.suffix == ".safetensors":
        return *read_tensors(path), ""
    state, said = read_weights(path)
    return state, {}, said


def resample_positions(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Fit a ViT's positions to the network's own grid where the file was trained at another image size."""
    own, given = getattr(net, "pos_embed", None), state.get("pos_embed")
    if own is None or given is None or given.ndim != 3 or own.ndim != 3 or given.shape[1] == own.shape[1]:
        return state
    vit: Any = net
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    side = round((given.shape[1] - prefix) ** 0.5)
    if side**2 != given.shape[1] - prefix:
        return state
    grid = list(vit.patch_embed.grid_size)
    resampled = timm.layers.resample_abs_pos_embed(given.float(), grid, [side, side], num_prefix_tokens=prefix)
    return {**state, "pos_embed": resampled}


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
