"""Which network: a timm name with sizes of its own, built with random weights; what is no ViT is refused by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.choices import is_hub, is_local
from bigtrain.models.families import MODULES, TAKE_ANY_SIZE
from bigtrain.models.lean_timm import timm
from bigtrain.models.timm_names import check_vit_name

NO_VIT = (
    "{}{}: its tokens cannot be compared patch by patch, nor patches hidden. Take a ViT, such as "
    "vit_base_patch16_224, or for this network recipes/panda.py or recipes/baselines.py."
)
FIXED_SIZE = ("beit", "vision_transformer_relpos")  # modules of timm whose networks are built for one size of pictures
KINDS = {  # modules of timm whose networks are taken for ViTs, and are none
    "swin_transformer": "merges patches from stage to stage", "hiera": "merges patches from stage to stage",
    "mvitv2": "merges patches from stage to stage", "pvt_v2": "merges patches from stage to stage",
    "twins": "merges patches from stage to stage", "davit": "merges patches from stage to stage",
    "cait": "brings its class token in at the end", "xcit": "mixes channels, and patches by convolution",
    "mlp_mixer": "mixes patches by fixed weights", "volo": "has outlook attention over pixels",
}  # fmt: skip


def check_tag(name: str) -> None:
    """Refuse a tag that names no weights of this network, as in resnet18.nope."""
    base, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")] if tag else []
    if tag and tag not in tags:
        raise ValueError(f"timm has no weights {tag!r} of {base}; it has {', '.join(tags) or 'none'}.")


def timm_module(name: str) -> str:
    """The module of timm that defines a network, such as "swin_transformer"."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def is_vit_name(name: str) -> bool:
    """Whether timm defines this network among its vision transformers."""
    return timm_module(name) in MODULES


def refusal(name: str) -> str:
    """Why a network is no ViT of ours, and what would serve."""
    module = timm_module(name) if timm.is_model(name) else ""
    why = next((why for kind, why in KINDS.items() if module.startswith(kind)), "")
    return NO_VIT.format(name, f" {why}" if why else " is not a vision transformer whose blocks map tokens to tokens")


@dataclass(frozen=True)
class Architecture:
    """A timm model by name, and what differs from its definition; 0 means as defined."""

    model: str
    image_size: int = 0
    patch_size: int = 0
    depth: int = 0

    def build(self, *, drop_path: float = 0.0) -> Any:
        """The network without a classifier, with random weights.

        Raises:
            ValueError: timm has no such model or weights, or it is no ViT, or does not take these sizes.
        """
        check_vit_name(self.model)
        check_tag(self.model)
        given: dict[str, Any] = {"img_size": self.image_size, "patch_size": self.patch_size, "depth": self.depth}
        given = {name: value for name, value in given.items() if value}
        if not is_vit_name(self.model):
            raise ValueError(refusal(self.model))
        if timm_module(self.model) in TAKE_ANY_SIZE:
            given["dynamic_img_size"] = True
        try:
            return timm.create_model(self.model, pretrained=False, num_classes=0, drop_path_rate=drop_path, **given)
        except (TypeError, AssertionError) as error:
            raise ValueError(
                f"{self.model} cannot be built with {', '.join(f'{name}={value}' for name, value in given.items())} "
                f"({error}): leave these sizes as timm defines them."
            ) from error


def asked_for(source: str, arch: str, image_size: int = 0, patch_size: int = 0, depth: int = 0) -> Architecture | None:
    """What settings ask for: a timm name with other sizes, or the network of a local file; None: the file knows."""
    if is_local(source) or is_hub(source):
        return Architecture(arch, image_size) if arch else None
    return Architecture(arch or source, image_size, patch_size, depth)


def check_blocks(what: str, count: int, backbone: Any, of: str = "network") -> None:
    """Refuse a number of blocks that a network does not have."""
    depth = len(backbone.blocks)
    if not 1 <= count <= depth:
        raise ValueError(f"{what} is {count}, and the {of} has {depth} blocks: use 1 to {depth}.")


def check_image_size(size: Sequence[int], patch_size: int) -> None:
    """Refuse images whose sides are no multiples of the patch."""
    if any(side % patch_size for side in size):
        lower = max(patch_size, max(size) // patch_size * patch_size)
        raise ValueError(
            f"patch size {patch_size} does not divide a picture or crop of {size[0]} x {size[1]} pixels: "
            f"use {lower} or {lower + patch_size}."
        )
