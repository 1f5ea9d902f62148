"""Vision models of Hugging Face's transformers: DINOv2, DINOv3, ViT, CLIP and SigLIP, to timm's names and back.

Their files spell one layer in several ways, by the version that wrote them; `from_transformers` takes them all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigtrain.models.architecture import Architecture

_BLOCK = re.compile(r"(?:.*\.)?(?:encoder\.)?layers?\.(\d+)\.(.+)")
_IN_BLOCK = [  # what follows the number of a block; the first that matches
    (r"(?:layernorm_before|layer_norm1|norm1)\.", "norm1."),
    (r"(?:layernorm_after|layer_norm2|norm2)\.", "norm2."),
    (r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
    (r"(?:attention\.attention\.|attention\.|self_attn\.)(?:query|q_proj)\.", "attn.q."),
    (r"(?:attention\.attention\.|attention\.|self_attn\.)(?:key|k_proj)\.", "attn.k."),
    (r"(?:attention\.attention\.|attention\.|self_attn\.)(?:value|v_proj)\.", "attn.v."),
    (r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.", "mlp.fc2."),
    (r"mlp\.gate_proj\.", "mlp.fc1_g."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
]
_AROUND = [
    (r"(?:.*\.)?embeddings\.(?:cls_token|class_embedding)", "cls_token"),
    (r"(?:.*\.)?embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed"),
    (r"(?:.*\.)?embeddings\.register_tokens", "reg_token"),
    (r"(?:.*\.)?embeddings\.mask_token", "mask_token"),
    (r"(?:.*\.)?embeddings\.patch_embeddings?\.(?:projection\.)?(weight|bias)", r"patch_embed.proj.\1"),
    (r"(?:.*\.)?pre_layrnorm\.(.+)", r"norm_pre.\1"),
    (r"(?:.*\.)?head\.probe", "attn_pool.latent"),
    (r"(?:.*\.)?head\.attention\.in_proj_(weight|bias)", r"attn_pool.in.\1"),
    (r"(?:.*\.)?head\.attention\.out_proj\.(.+)", r"attn_pool.proj.\1"),
    (r"(?:.*\.)?head\.layernorm\.(.+)", r"attn_pool.norm.\1"),
    (r"(?:.*\.)?head\.mlp\.(.+)", r"attn_pool.mlp.\1"),
    (r"(?:.*\.)?(?:post_layernorm|layernorm|norm)\.(weight|bias)", r"norm.\1"),
    (r"(?:.*\.)?pooler\.(.+)", r"pooler.\1"),
    (r"(?:visual_projection|classifier)\.(.+)", r"head.\1"),
]
_OF_TEXT = re.compile(r"(^|\.)text_model\.|text_projection|logit_(scale|bias)$")


def has_transformers_names(state: Mapping[str, Tensor]) -> bool:
    return any(re.search(r"(^|\.)embeddings\.patch_embeddings?\.", key) for key in state)


def towers(state: Mapping[str, Tensor]) -> list[str]:
    """What stands before the names of each vision model in a file, such as "vision_model."."""
    found = (re.fullmatch(r"(.*?)embeddings\.patch_embeddings?\..*", key) for key in state)
    return sorted({match[1] for match in found if match})


def from_transformers(state: Mapping[str, Tensor], net: Any) -> dict[str, Tensor]:
    """The tensors of a vision model under the names that timm's network has; what is not known keeps its name."""
    own = net.state_dict()
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if not _OF_TEXT.search(key):
            named[_timm_name(key, own)] = value
    shapes = {"cls_token": lambda x: x.reshape(1, 1, -1), "pos_embed": lambda x: x[None] if x.ndim == 2 else x}
    named = {key: shapes[key](value) if key in shapes else value for key, value in named.items()}
    position = named.get("pos_embed")
    if position is not None and "cls_token" in named and getattr(net, "no_embed_class", False):
        # the position of [CLS] is a constant, and timm has added it
        named["cls_token"], named["pos_embed"] = named["cls_token"] + position[:, :1], position[:, 1:]
    for kind in ("weight", "bias"):
        if f"attn_pool.in.{kind}" in named:
            q, k, v = named.pop(f"attn_pool.in.{kind}").chunk(3)
            named |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat([k, v])}
    return _joined(named, own)


def _timm_name(key: str, own: Mapping[str, Tensor]) -> str:
    if inside := _BLOCK.fullmatch(key):
        number, rest = inside.groups()
        for pattern, name in _IN_BLOCK:
            if re.match(pattern, rest):
                rest = re.sub(f"^{pattern}", name, rest)
                break
        else:
            gated = f"blocks.{number}.mlp.fc1_x.weight" in own
            rest = re.sub(r"^mlp\.up_proj\.", "mlp.fc1_x." if gated else "mlp.fc1.", rest)
        if f"blocks.{number}.gamma_1" in own:
            rest = re.sub(r"ls([12])\.gamma", r"gamma_\1", rest)
        return f"blocks.{number}.{rest}"
    return next((re.sub(pattern, name, key) for pattern, name in _AROUND if re.fullmatch(pattern, key)), key)


def _joined(named: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as timm's network has them, in one matrix or three; a bias that it lacks must be 0."""
    for stem in [key.removesuffix("attn.q.weight") for key in named if key.endswith("attn.q.weight")]:
        if f"{stem}attn.q_proj.weight" in own:
            for part in "qkv":
                for kind in ("weight", "bias"):
                    if f"{stem}attn.{part}.{kind}" in named:
                        named[f"{stem}attn.{part}_proj.{kind}"] = named.pop(f"{stem}attn.{part}.{kind}")
            continue
        weights = [named.pop(f"{stem}attn.{part}.weight") for part in "qkv"]
        biases = [named.pop(f"{stem}attn.{part}.bias", None) for part in "qkv"]
        named[f"{stem}attn.qkv.weight"] = torch.cat(weights)
        filled = [torch.zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        if f"{stem}attn.q_bias" in own and not bool(filled[1].any()):
            named |= {f"{stem}attn.q_bias": filled[0], f"{stem}attn.v_bias": filled[2]}
        elif f"{stem}attn.qkv.bias" in own or any(bool(bias.any()) for bias in filled):
            named[f"{stem}attn.qkv.bias"] = torch.cat(filled)
    return named


_ACTS = {  # model_type -> the activations that timm's networks have
    "vit": ("gelu",), "dinov2": ("gelu",), "dinov2_with_registers": ("gelu",), "dinov3_vit": ("gelu", "silu"),
    "clip_vision_model": ("quick_gelu", "gelu"), "siglip_vision_model": ("gelu_pytorch_tanh", "gelu"),
}  # fmt: skip
_BY_WIDTH: dict[str, dict[int, str]] = {  # model_type -> width -> timm's name; {patch} and {size} are the config's
    "vit": {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224",
            1024: "vit_large_patch16_224", 1280: "vit_huge_patch14_224"},
    "dinov2": {384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2", 1024: "vit_large_patch14_dinov2",
               1536: "vit_giant_patch14_dinov2"},
    "dinov2_with_registers": {
        384: "vit_small_patch14_reg4_dinov2", 768: "vit_base_patch14_reg4_dinov2",
        1024: "vit_large_patch14_reg4_dinov2", 1536: "vit_giant_patch14_reg4_dinov2"},
    "dinov3_vit": {384: "vit_small_patch16_dinov3_qkvb", 768: "vit_base_patch16_dinov3_qkvb",
                   1024: "vit_large_patch16_dinov3_qkvb", 1280: "vit_huge_plus_patch16_dinov3_qkvb",
                   4096: "vit_7b_patch16_dinov3"},
    "clip_vision_model": {512: "vit_medium_patch16_clip_224", 768: "vit_base_patch16_clip_224",
                          1024: "vit_large_patch14_clip_224", 1280: "vit_huge_patch14_clip_224"},
    "siglip_vision_model": {768: "vit_base_patch16_siglip_224", 1024: "vit_large_patch16_siglip_256",
                            1152: "vit_so400m_patch14_siglip_224", 1536: "vit_giantopt_patch16_siglip_256"},
}  # fmt: skip


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """timm's network for a transformers config.

    Raises:
        ValueError: the model is of another kind, or timm has none of its width.
    """
    if "vision_config" in config:  # of a pair of towers
        kind = str(config.get("model_type", ""))
        config = {"model_type": f"{kind}_vision_model", **config["vision_config"]}
    kind, width = str(config.get("model_type", "")).replace("siglip2", "siglip"), int(config.get("hidden_size", 768))
    if (act := config.get("hidden_act")) and kind in _ACTS and act not in _ACTS[kind]:
        raise ValueError(f"{where} has the activation {act}, and timm's {kind} has {' or '.join(_ACTS[kind])}.")
    if kind not in _BY_WIDTH:
        what = f"a {kind} model" if kind else "a model of unknown kind"
        raise ValueError(
            f"{where} holds {what}, and of transformers' models those of {', '.join(_BY_WIDTH)} are taken: convert it "
            "to timm's names, and give the file with --arch."
        )
    if width not in _BY_WIDTH[kind]:
        raise ValueError(f"{where} is {width} wide, and timm has no {kind} of that width: give the file with --arch.")
    name = _BY_WIDTH[kind][width]
    if kind == "dinov3_vit" and width == 384 and config.get("use_gated_mlp"):
        name = "vit_small_plus_patch16_dinov3_qkvb"
    if kind == "clip_vision_model" and config.get("hidden_act", "quick_gelu") == "quick_gelu" and width != 512:
        name = name.replace("_clip_", "_clip_quickgelu_")
    return Architecture(
        name, int(config.get("image_size", 224)), int(config.get("patch_size", 16)),
        int(config.get("num_hidden_layers", 12)),
    )  # fmt: skip
