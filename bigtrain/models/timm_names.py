"""The networks that timm has, by name, read from its source files: a wrong name is refused without importing torch."""

from __future__ import annotations

import ast
import fnmatch
import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from bigtrain.choices import LOCAL, is_hub, is_local

ALEXNET = "alexnet"  # the one network of the papers that timm lacks
_MODEL = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
_DEPRECATED = re.compile(r"^register_model_deprecations\(__name__, (\{.*?^\})\)", re.MULTILINE | re.DOTALL)


@lru_cache(maxsize=1)
def timm_names() -> frozenset[str]:
    """All names that `timm.create_model` takes, deprecated ones too, without the tag of their weights."""
    package = find_spec("timm")  # finds it, and imports nothing
    assert package is not None and package.origin is not None
    names: set[str] = set()
    for file in (Path(package.origin).parent / "models").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        names.update(_MODEL.findall(text))
        for table in _DEPRECATED.findall(text):
            names.update(key.value.split(".")[0] for key in ast.parse(table, mode="eval").body.keys)
    return frozenset(names)


def is_timm_name(name: str) -> bool:
    """Whether timm has this network; whether those weights exist is left to timm."""
    return name.split(".")[0] in timm_names()


def near(name: str, letters: int, instead: str) -> str:
    """Up to five networks with similar names, or `instead`."""
    names = sorted(timm_names(), key=lambda known: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", known)])
    return ", ".join(fnmatch.filter(names, f"*{name.split('.')[0][:letters]}*")[:5]) or instead


def check_vit_name(name: str) -> None:
    """Refuse a name that timm does not have, where a ViT is named."""
    if not is_timm_name(name):
        raise ValueError(f"timm has no model {name!r}; near it: {near(name, 12, 'vit_base_patch16_224')}.")


def check_network_name(name: str) -> None:
    """Refuse a name that neither timm nor torchvision's AlexNet has, where any network is named."""
    if name != ALEXNET and not is_timm_name(name):
        alike = near(name, 8, "resnet50, vgg16")
        raise ValueError(f"timm has no model {name!r}; near it: {alike}; {ALEXNET} is torchvision's.")


def check_source(source: str, *, is_vit: bool = False) -> None:
    """Refuse a file of weights that does not exist, or a name that timm lacks."""
    if not (is_local(source) or is_hub(source)):
        (check_vit_name if is_vit else check_network_name)(source)
    elif is_local(source) and not Path(source).expanduser().exists():
        raise ValueError(
            f"{source} does not exist: give a file of weights ({', '.join(LOCAL)}), a folder in Hugging Face's form, "
            "or a timm name."
        )


def licence_of_weights(name: str) -> str:
    """What timm says of the licence of released weights; empty where it says nothing, or the name is not its own."""
    from bigtrain.models.lean_timm import timm

    try:
        found = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    except (RuntimeError, ValueError):
        return ""
    return str(getattr(found, "license", "") or "")
