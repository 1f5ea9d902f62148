"""The choices of settings. They need no torch, so that a command line is read without it."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

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

Tracker = Literal["wandb", "mlflow", "trackio"]
"""Experiment trackers: runtime/trackers.py; each is an extra of pyproject.toml of the same name."""

HIGHEST_LR = 1e30
"""Above it an optimizer's arithmetic overflows fp32."""


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML file is what a setting's type allows; a whole number serves as a float."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        one, *others = get_args(kind)
        kinds = [one] * len(value) if others == [...] and isinstance(value, tuple) else [one, *others]
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))
