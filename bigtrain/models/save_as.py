"""Writes a network as a folder that timm or transformers load: weights, config, preprocessing, and a card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor

from bigtrain.choices import SaveAs
from bigtrain.files import whole_folder
from bigtrain.models.network import Network

MODEL_TYPES = {  # a part of timm's name -> transformers' model_type, the class that loads it
    r"_dinov3(_qkvb)?$": ("dinov3_vit", "DINOv3ViTModel"),
    r"_reg4_dinov2$": ("dinov2_with_registers", "Dinov2WithRegistersModel"),
    r"_dinov2$": ("dinov2", "Dinov2Model"),
    r"_clip_(quickgelu_)?\d+$": ("clip_vision_model", "CLIPVisionModel"),
    r"_siglip_\d+$": ("siglip_vision_model", "SiglipVisionModel"),
    r"^vit_(tiny|small|base|large|huge)_patch\d+_\d+$": ("vit", "ViTModel"),
}


def model_type(name: str) -> tuple[str, str]:
    """transformers' model_type and class for a timm name.

    Raises:
        ValueError: transformers has no such network.
    """
    base = name.partition(".")[0]
    if found := next((kind for pattern, kind in MODEL_TYPES.items() if re.search(pattern, base)), None):
        return found
    raise ValueError(f"transformers has no network like {name}: use --save-as timm.")


def save_as(form: SaveAs, network: Network, folder: Path, card: str) -> None:
    """Write a network in another library's form; the folder appears whole or not at all.

    Args:
        form: "timm": `timm.create_model("local-dir:FOLDER")`; "hf": `transformers.AutoModel.from_pretrained(FOLDER)`.
        card: the text of its README.md.

    Raises:
        ValueError: transformers has no such network.
    """
    if form == "hf":
        model_type(network.architecture.model)
    with whole_folder(folder) as place:
        side = network.image_size or 224
        pixels = {"mean": network.mean, "std": network.std, "input_size": (3, side, side)}
        if form == "timm":
            save_for_hf(network.backbone, str(place), safe_serialization=True, data_config=pixels)
        else:
            config, tensors = to_transformers(network)
            save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
            size = {"height": network.image_size, "width": network.image_size}
            preprocessing = {
                "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size, "do_rescale": True,
                "do_normalize": True, "image_mean": network.mean, "image_std": network.std,
            }  # fmt: skip
            for name, content in (("config", config), ("preprocessor_config", preprocessing)):
                (place / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (place / "README.md").write_text(card, encoding="utf-8")
        for file in place.iterdir():
            file.chmod(0o644)  # safetensors' files can be read by their owner alone


def to_transformers(network: Network) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a ViT as transformers has them."""
    net: Any = network.backbone
    kind, architecture = model_type(network.architecture.model)
    state = {key: value.detach().float().cpu().contiguous() for key, value in net.state_dict().items()}
    mlp = net.blocks[0].mlp
    config: dict[str, Any] = {
        "model_type": kind, "architectures": [architecture], "hidden_size": net.embed_dim,
        "num_hidden_layers": len(net.blocks), "num_attention_heads": net.blocks[0].attn.num_heads,
        "image_size": network.image_size, "patch_size": network.vit.patch_size, "num_channels": 3,
        "layer_norm_eps": net.blocks[0].norm1.eps, "dtype": "float32",
        "intermediate_size": mlp.fc2.in_features, "mlp_ratio": round(mlp.fc2.in_features / net.embed_dim),
    }  # fmt: skip
    if kind == "clip_vision_model":
        config["hidden_act"] = "quick_gelu" if "quickgelu" in network.architecture.model else "gelu"
    if kind == "siglip_vision_model":
        config["hidden_act"] = "gelu_pytorch_tanh" if "tanh" in str(mlp.act).lower() else "gelu"
    if kind in ("dinov3_vit", "dinov2_with_registers"):
        config["num_register_tokens"] = net.num_prefix_tokens - 1
    if kind == "dinov3_vit":
        config["use_gated_mlp"] = hasattr(mlp, "fc1_g")
        config["hidden_act"] = "silu" if hasattr(mlp, "fc1_g") else "gelu"
    if "dinov2" in kind:
        config["use_swiglu_ffn"] = hasattr(mlp, "gate_last")
    names = {"dinov3_vit": _of_dinov3, "clip_vision_model": _of_clip, "siglip_vision_model": _of_clip}
    tensors = dict(names.get(kind, _of_vit)(state, kind))
    return config, {key: value.contiguous() for key, value in tensors.items()}


Named = Iterator[tuple[str, Tensor]]


def _blocks(state: dict[str, Tensor], name: Callable[[str], str], where: str, parts: tuple[str, str, str]) -> Named:
    """The tensors of the blocks: what `name` calls them, with query, key and value apart."""
    for key, value in state.items():
        if not (found := re.fullmatch(r"blocks\.(\d+)\.(.+)", key)):
            continue
        number, rest = found.groups()
        if split := re.fullmatch(r"attn\.qkv\.(weight|bias)", rest):
            for part, piece in zip(parts, value.chunk(3), strict=True):
                yield f"{where}.{number}.{part}.{split[1]}", piece
        elif rest in ("attn.q_bias", "attn.v_bias"):
            yield f"{where}.{number}.{parts['q v'.index(rest[5])]}.bias", value
        else:
            yield f"{where}.{number}.{name(rest)}", value


def _renamed(rest: str, table: dict[str, str]) -> str:
    stem = next((stem for stem in table if rest.startswith(stem)), "")
    return table.get(stem, "") + rest.removeprefix(stem)


def _of_vit(state: dict[str, Tensor], kind: str) -> Named:
    is_vit, width = kind == "vit", state["cls_token"].shape[-1]
    position = state["pos_embed"]
    if "reg_token" in state:
        position = torch.cat([torch.zeros(1, 1, width), position], dim=1)  # timm adds [CLS]'s to the token
        yield "embeddings.register_tokens", state["reg_token"]
    if not is_vit:
        yield "embeddings.mask_token", torch.zeros(1, width)
    yield "embeddings.cls_token", state["cls_token"]
    yield "embeddings.position_embeddings", position
    for leaf in ("weight", "bias"):
        yield f"embeddings.patch_embeddings.projection.{leaf}", state[f"patch_embed.proj.{leaf}"]
        yield f"layernorm.{leaf}", state[f"norm.{leaf}"]
    gated = not is_vit and state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]
    table = {
        "norm1": "layernorm_before" if is_vit else "norm1", "norm2": "layernorm_after" if is_vit else "norm2",
        "attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1": "intermediate.dense" if is_vit else "mlp.weights_in" if gated else "mlp.fc1",
        "mlp.fc2": "output.dense" if is_vit else "mlp.weights_out" if gated else "mlp.fc2",
    }  # fmt: skip
    parts = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
    yield from _blocks(state, lambda rest: _renamed(rest, table), "encoder.layer", parts)


def _of_dinov3(state: dict[str, Tensor], kind: str) -> Named:
    yield "embeddings.cls_token", state["cls_token"]
    yield "embeddings.register_tokens", state["reg_token"]
    yield "embeddings.mask_token", torch.zeros_like(state["cls_token"])
    for leaf in ("weight", "bias"):
        yield f"embeddings.patch_embeddings.{leaf}", state[f"patch_embed.proj.{leaf}"]
        yield f"norm.{leaf}", state[f"norm.{leaf}"]
    table = {
        "attn.proj": "attention.o_proj", "gamma_1": "layer_scale1.lambda1", "gamma_2": "layer_scale2.lambda1",
        "mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
    }  # fmt: skip
    parts = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    yield from _blocks(state, lambda rest: _renamed(rest, table), "layer", parts)
    if "blocks.0.attn.q_bias" not in state:  # transformers' network has them
        for number in {key.split(".")[1] for key in state if key.startswith("blocks.")}:
            for part in (parts[0], parts[2]):
                yield f"layer.{number}.{part}.bias", torch.zeros(state["cls_token"].shape[-1])


def _of_clip(state: dict[str, Tensor], kind: str) -> Named:
    yield "embeddings.position_embedding.weight", state["pos_embed"][0]
    yield "embeddings.patch_embedding.weight", state["patch_embed.proj.weight"]
    if kind == "clip_vision_model":
        yield "embeddings.class_embedding", state["cls_token"].flatten()
    else:
        yield "embeddings.patch_embedding.bias", state["patch_embed.proj.bias"]
        yield "head.probe", state["attn_pool.latent"]
        for leaf in ("weight", "bias"):
            joined = torch.cat([state[f"attn_pool.q.{leaf}"], state[f"attn_pool.kv.{leaf}"]])
            yield f"head.attention.in_proj_{leaf}", joined
            for ours, theirs in (("proj", "attention.out_proj"), ("norm", "layernorm"), ("mlp.fc1", "mlp.fc1"),
                                 ("mlp.fc2", "mlp.fc2")):  # fmt: skip
                yield f"head.{theirs}.{leaf}", state[f"attn_pool.{ours}.{leaf}"]
    for leaf in ("weight", "bias"):
        yield f"post_layernorm.{leaf}", state[f"norm.{leaf}"]
        if f"norm_pre.{leaf}" in state:
            yield f"pre_layrnorm.{leaf}", state[f"norm_pre.{leaf}"]
    table = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    yield from _blocks(state, lambda rest: _renamed(rest, table), "encoder.layers", parts)
