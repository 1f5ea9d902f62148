"""What settings may be: choices by name, ranges of numbers. Needs no torch, so that a command line is read without."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

LOCAL = (".safetensors", ".pth", ".pt", ".npz", ".bin", ".ckpt", ".pth.tar")  # what files of weights end with
HUB = ("hf-hub:", "hf_hub:")
Keep = Literal["attended", "unattended", "random"]
"""Which patches a student sees: methods/defend/masks.py."""
KeepOrAuto = Literal["auto", "attended", "unattended", "random"]
Predict = Literal["visible", "hidden", "all"]
"""Which patches' tokens a student is to predict: methods/defend/equations.py."""
ScoreOver = Literal["mean", "quantile", "attended"]
"""How the scores of a picture's patches become the picture's: methods/defend/equations.py."""
Backend = Literal["auto", "xformers", "sdpa", "dense"]
"""What computes attention: models/attention.py."""
BatchNorm = Literal["frozen", "trained"]
Normalisation = Literal["l2", "layer", "none"]
"""Of tokens before they are compared: objectives/token_distances.py."""
Distance = Literal["squared", "smooth_l1"]
Overlap = Literal["share", "weighted", "cosine"]
"""Of a picture with a signature: methods/signatures/equations.py."""
Variant = Literal["paper", "author_code"]
"""Of the membership loss: methods/deep_novelty/equations.py."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Chosen = Literal["fp32", "bf16", "fp16"]
"""What "auto" resolves to."""
Schedule = Literal["constant", "cosine"]
"""Of the learning rate: training/optim.py."""

SaveAs = Literal["", "timm", "hf"]
"""In which library's form a network is written beside bigtrain's: models/save_as.py."""
CacheDtype = Literal["auto", "fp32", "bf16", "int8"]  # of kept tokens
Compile = Literal["auto", "on", "off"]  # auto: on GPUs, where a stage is long
Workers = Literal["auto"] | int  # of a process; auto: by its share of the machine
Tracker = Literal["wandb", "mlflow", "trackio"]
"""Experiment trackers: runtime/trackers.py; each is an extra of pyproject.toml of the same name."""

HIGHEST_LR = 1e30
"""Above it an optimizer's arithmetic overflows fp32."""

RANGE = "range"
WORDS = {int: "whole number", float: "number", str: "string", list: "list", dict: "table"}
MAX_NAMED = 20  # settings that an error lists


def is_local(source: Any) -> bool:
    """Whether a network's name is that of a file of weights, or of a folder with one."""
    name = str(source)
    first, slash, _ = name.partition("/")
    is_there = Path(name).is_dir() or bool(slash and Path(first).is_dir())  # or below a folder that is
    return name.lower().endswith(LOCAL) or name.startswith(("/", "./", "../", "~")) or is_there


def is_hub(source: Any) -> bool:
    """Whether a network's name is that of a model on Hugging Face's hub: hf-hub:org/name, or org/name."""
    name = str(source)
    return name.startswith(HUB) or (name.count("/") == 1 and not is_local(name))


def setting(default: Any, low: float, high: float = math.inf) -> Any:
    """A field of a settings dataclass with its range, ends included; of a tuple, the range of each element."""
    return dataclasses.field(default=default, metadata={RANGE: (low, high)})


def reach(low: float, high: float) -> str:
    return f"at least {low}" if math.isinf(high) else f"from {low} to {high}"


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_ranges(config: Any, called: Callable[[str], str] = flag) -> None:
    """Refuse settings outside of their range; a pair must also rise.

    Args:
        called: how an error names a setting.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, called)
        if RANGE not in field.metadata:
            continue
        low, high = field.metadata[RANGE]
        values = value if isinstance(value, tuple) else (value,)
        if not all(low <= v <= high for v in values if not isinstance(v, str)):
            raise ValueError(f"{called(field.name)} is {value}; it must be {reach(low, high)}.")
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"{called(field.name)} is {value}; the first must not be above the second.")


def checked_values(
    where: str, given: Mapping[str, Any], kinds: Mapping[str, Any], noun: str = "setting"
) -> dict[str, Any]:
    """The values of a TOML table, its lists as tuples where a tuple is asked for.

    Args:
        kinds: the type of each name that there may be.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    found = {}
    for name, value in given.items():
        if name not in kinds:
            every = sorted(kinds) if len(kinds) <= MAX_NAMED else ["see --help"]
            near = difflib.get_close_matches(name, kinds, n=2) or every
            raise ValueError(f"{where}: there is no {noun} {name!r}; near it: {', '.join(near)}.")
        found[name] = tuple(value) if isinstance(value, list) and get_origin(kinds[name]) is tuple else value
        if not fits(found[name], kinds[name]):
            raise ValueError(f"{where}: {name} is {value!r}; it must be {in_words(kinds[name])}.")
    return found


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML file is what a setting's type allows; a whole number serves as a float."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        one, *others = get_args(kind)
        kinds = [one] * len(value) if others == [...] and isinstance(value, tuple) else [one, *others]
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def in_words(kind: Any) -> str:
    """What a value must be, as an error says it: "a whole number", "a list of strings"."""
    if kind is bool:
        return "true or false"
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " or ".join(map(in_words, get_args(kind)))
    if get_origin(kind) is tuple:
        one, *others = get_args(kind)
        count = "" if others == [...] else f"{1 + len(others)} "
        return f"a list of {count}{WORDS[one]}s" if one in WORDS else f"a list, each {in_words(one)}"
    return f"a {WORDS.get(kind, kind)}"
