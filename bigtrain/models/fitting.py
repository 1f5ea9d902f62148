"""Which of a file's tensors are a network's, under whichever names: prefixes, released files, Hugging Face's models."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from bigtrain.models.transformers_names import from_transformers, has_transformers_names, towers

PATCHES = "patch_embed.proj.weight"
PREFERRED = ("ema", "teacher")  # of several networks in one file
LOOKS_LIKE = {  # a key that tells what wrote a file
    r"text_model\.|\.text_projection|^token_embedding": "a text tower",
    r"(^|\.)layer1\.0\.conv1\.": "a ResNet",
    r"(^|\.)transformer\.resblocks\.": "OpenAI's CLIP",
    r"(^|\.)layers\.\d+\.blocks\.\d+\.attn": "a Swin transformer",
    r"(^|\.)stages\.\d+\.": "a network of stages, such as ConvNeXt",
    r"embeddings\.patch_embedding": "transformers' vision models",
    r"(^|\.)blocks\.\d+\.attn\.": "a ViT in timm's names",
    r"(^|\.)features\.\d+\.": "torchvision's VGG, AlexNet or MobileNet",
}


def fitted(state: Mapping[str, Tensor], net: nn.Module, source: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a network under its own names, as far as there are any, and what is to be said of them.

    Tried are the names as they are behind any prefix (module., _orig_mod., teacher.backbone. ...), those of
    transformers, and those of the releases that timm knows (DINOv2, DINOv3, OpenAI's CLIP, EVA, PE, SAM, BEiT).
    Positions of another grid are resampled; patches of another size are refused.

    Raises:
        ValueError: the file holds several such networks, or one of another patch size.
    """
    own = set(net.state_dict())
    prefix = _prefix(state, own, source)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    _check_patch_size(inside, net, source)
    best: tuple[int, dict[str, Tensor], str] = (-1, dict(inside), "")
    for said, form in _forms(inside, net, source):
        form, changed = _adapted(form, net)
        matched = sum(key in form for key in own)
        if matched > best[0]:
            best = matched, form, said + changed
        if matched == len(own):
            break
    matched, form, said = best
    if prefix:
        others = sorted({key.split(".")[0] for key in state if not key.startswith(prefix)})
        beside = f", {', '.join(others[:4])}{', ...' if len(others) > 4 else ''} beside it left out" if others else ""
        said = f"; below {prefix.rstrip('.')}{beside}{said}"
    return form, said


def looks_like(state: Mapping[str, Tensor]) -> str:
    """What kind of network wrote these keys; "" if it is not known."""
    return next((kind for pattern, kind in LOOKS_LIKE.items() if any(re.search(pattern, key) for key in state)), "")


def _prefix(state: Mapping[str, Tensor], own: set[str], source: str) -> str:
    """What stands before the network's own names in a file; "" if nothing does, or the names are others."""
    anchors = sorted(own, key=lambda key: (-key.count("."), key))[:3] + sorted(own)[:3]
    found = {key[: -len(anchor)] for anchor in anchors for key in state if key.endswith(f".{anchor}")} | {""}
    matches = {prefix: sum(f"{prefix}{key}" in state for key in own) for prefix in sorted(found)}
    most = max(matches.values())
    return _one_of([prefix for prefix, count in matches.items() if count == most and most], source)


def _one_of(prefixes: Sequence[str], source: str) -> str:
    """The prefix of the network to take: the only one, or the only moving average or teacher; "" where there is none.

    Raises:
        ValueError: there are several.
    """
    for word in PREFERRED if len(prefixes) > 1 else ():
        if preferred := [prefix for prefix in prefixes if word in re.split(r"[._]", prefix.lower())]:
            prefixes = preferred
            break
    if len(prefixes) > 1:
        names = ", ".join(sorted(prefix.rstrip(".") for prefix in prefixes))
        raise ValueError(f"{source} holds several such networks ({names}): choose one with --weights-key.")
    return next(iter(prefixes), "")


def _forms(state: Mapping[str, Tensor], net: nn.Module, source: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors under each kind of names that they may have."""
    if has_transformers_names(state):
        prefix = _one_of(towers(state), source)
        inside = {key: value for key, value in state.items() if key.startswith(prefix)}
        yield (
            f"; in transformers' names{', below ' + prefix.rstrip('.') if prefix else ''}",
            from_transformers(inside, net),
        )
        return
    module: Any = import_module(type(net).__module__)
    form = dict(state)
    if "fc_norm.weight" in net.state_dict() and "mask_token" in form:
        form.pop("mask_token")  # or timm takes a finetuned network's norms for a pretrained one's
    filtered: dict[str, Tensor] | None = None
    if hasattr(module, "checkpoint_filter_fn"):
        # of a form that it does not know, which then fails to match; it prints
        with suppress(Exception), redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            filtered = module.checkpoint_filter_fn(form, net)
    if filtered is not None:
        beside = len(state) - len(filtered)
        left_out = f"; left out: {beside} further keys of the release" if beside > 0 else ""
        yield _resampled(state, net) + left_out, filtered
    yield "", dict(state)


def _adapted(state: dict[str, Tensor], net: nn.Module) -> tuple[dict[str, Tensor], str]:
    """What a finetuned file calls otherwise: the norm behind pooling serves as the final norm, and the reverse."""
    own = net.state_dict()
    for there, here in (("fc_norm", "norm"), ("norm", "fc_norm")):
        if f"{there}.weight" in state and f"{there}.weight" not in own and f"{here}.weight" in own:
            if f"{here}.weight" in state:
                continue
            renamed = {re.sub(rf"^{there}\.", f"{here}.", key): value for key, value in state.items()}
            return renamed, f"; its {there} serves as {here}"
    return state, ""


def _resampled(state: Mapping[str, Tensor], net: Any) -> str:
    """What timm's filter does to positions of another grid."""
    position, stem = state.get("pos_embed"), getattr(net, "patch_embed", None)
    if position is None or position.ndim != 3 or stem is None or not hasattr(stem, "num_patches"):
        return ""
    prefix = getattr(net, "num_prefix_tokens", 0)
    side = next((round(n**0.5) for n in (position.shape[1] - p for p in (0, 1, prefix)) if round(n**0.5) ** 2 == n), 0)
    grid = tuple(stem.grid_size)
    if not side or grid == (side, side):
        return ""
    return f"; positions resampled from {side} x {side} to {grid[0]} x {grid[1]}"


def _check_patch_size(state: Mapping[str, Tensor], net: nn.Module, source: str) -> None:
    """Refuse patches of another size, which timm would resample in silence."""
    given, own = state.get(PATCHES), net.state_dict().get(PATCHES)
    if given is not None and own is not None and given.ndim == own.ndim == 4 and given.shape[2:] != own.shape[2:]:
        raise ValueError(
            f"{source} has patches of {given.shape[2]} x {given.shape[3]} pixels, and the network of {own.shape[2]} x "
            f"{own.shape[3]}: name a network with the file's patches by --arch."
        )
