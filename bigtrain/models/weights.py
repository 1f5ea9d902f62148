"""Our own files of weights, and how any weights enter a network: matched key by key.

Every load accounts for every key: a missing or unexpected one is an error, except the pretraining
task's classifier, which is left out and reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialize
from torch import Tensor, nn

from bigtrain.files import whole_file
from bigtrain.models.fitting import looks_like
from bigtrain.models.read_weights import ABOUT

PRETRAINING = re.compile(
    r"(head|head_dist|pre_logits|fc_norm|attn_pool|mask_token|decoder\w*|lm_head|projectors|pooler)(\.|$)"
)
"""What training leaves beside a backbone: classifiers, pooling layers, decoders."""


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
        key for key in state if key not in own and (PRETRAINING.match(key) or key.startswith(f"{classifier}."))
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
        kind = looks_like(state) if len(missing) > len(own) / 2 else ""
        raise ValueError(
            f"{source} does not fit the network: {len(own) - len(missing)} keys match, {'; '.join(wrong)}. "
            f"{f'Its names look like those of {kind}. ' if kind else ''}Name the network these weights belong to with "
            "--arch."
        )
    if broken := [key for key in own if state[key].is_floating_point() and not bool(state[key].isfinite().all())]:
        raise ValueError(
            f"{source} has weights that are NaN or infinite ({', '.join(broken[:4])}{', ...' if broken[4:] else ''}): "
            "take an earlier checkpoint of its training."
        )
    module.load_state_dict({key: state[key].float() for key in own})
    named = f"{', '.join(left_out[:4])}{f' and {len(left_out) - 4} more' if len(left_out) > 4 else ''}"
    rest = f", left out: {named} (of the pretraining task)" if left_out else ""
    return f"{len(own)} keys matched, none missing or unexpected{rest}"
