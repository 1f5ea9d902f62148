"""The choices of settings. They need no torch, so that a command line is read without it."""

from __future__ import annotations

from typing import Literal

Keep = Literal["attended", "unattended", "random"]
"""Which patches a student sees: data/masks.py."""
KeepOrAuto = Literal["auto", "attended", "unattended", "random"]
Predict = Literal["visible", "hidden", "all"]
"""Which patches' tokens a student is to predict: objectives/losses.py."""
ScoreOver = Literal["mean", "quantile", "attended"]
"""How the scores of a picture's patches become the picture's: objectives/scores.py."""
Backend = Literal["auto", "xformers", "sdpa", "dense"]
"""What computes attention: models/attention.py."""
BatchNorm = Literal["frozen", "trained"]
Normalisation = Literal["l2", "layer", "none"]
"""Of tokens before they are compared: objectives/losses.py."""
Distance = Literal["squared", "smooth_l1"]
Overlap = Literal["share", "weighted", "cosine"]
"""Of a picture with a signature: detectors/signatures.py."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Chosen = Literal["fp32", "bf16", "fp16"]
"""What "auto" resolves to."""
Schedule = Literal["constant", "cosine"]
"""Of the learning rate: runtime/optim.py."""

HIGHEST_LR = 1e30
"""Beyond it an optimizer's own arithmetic leaves fp32."""
