"""bigtrain: train and judge visual novelty detectors at scale.

    raw pictures -> tar shards, manifest, index      shards/
    shards -> batches                                bigtrain.data: schema, protocol, plan, stream, views
    batches -> tokens, features                      bigtrain.models
    features -> losses, novelty scores               bigtrain.objectives, bigtrain.detectors
    scores -> figures, tables, report                bigtrain.evaluation
    a paper's equations, network, detector, page     bigtrain.methods, a package each
    settings, stages, a run from start to finish     bigtrain.training, on bigtrain.runtime;  recipes/ are the papers

For every package, shards and slurm too: files (one atomic writer), retry (one policy), images and jpeg (from bytes to
RGB), pages (HTML), progress, text, choices. Each imports only those above it in this list (tests/test_imports.py).
WORDS.md has the words.

Axes in tensor names: B images, V views, N patches (n: the visible ones), M patches of a crop, T packed tokens, L
blocks, D features (d: of one head), H heads, K prototypes, C classes, H W pixels, h w the patch grid.

One polarity: novelty scores are higher for the more novel; `visible` is True where the student sees; boxes are (top,
left, bottom, right), half-open.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_detector"]


def __getattr__(name: str) -> Any:
    if name == "load_detector":  # on first use: it needs torch, and `import bigtrain` should stay cheap
        from bigtrain.detectors import load_detector

        return load_detector
    raise AttributeError(f"module 'bigtrain' has no attribute {name!r}")


def _end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a recipe is still importing: a line instead of a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; the same command continues.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if Path(sys.argv[0] if sys.argv else "").absolute().parent.name == "recipes":
    sys.excepthook = _end_quietly
