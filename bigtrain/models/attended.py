"""What a network's own attention attends to: its queries and keys are noted down while timm's modules run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Attended(TorchFunctionMode):
    """Within it, the queries, keys and additive masks that attention is computed from are noted down.

    Args:
        bias_BHTT: takes the place of the mask that the network asks for, as where patches are left out.
    """

    def __init__(self, bias_BHTT: Tensor | None = None) -> None:
        super().__init__()
        self.bias_BHTT = bias_BHTT
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            kwargs = {**(kwargs or {})}
            if self.bias_BHTT is not None:
                kwargs["attn_mask"] = self.bias_BHTT
            self.note(args[0], args[1], kwargs.get("attn_mask"))
        return function(*args, **(kwargs or {}))

    def note(self, q_BHTd: Tensor, k_BHTd: Tensor, bias: Tensor | None = None) -> None:
        """Note one computation of attention, (B, H, T, d)."""
        self.calls.append((q_BHTd, k_BHTd, bias))

    def to_patches(
        self, queries: slice, patches: slice, images: int, subtracted: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """How much the patches are attended to: (B, N), mean over heads, float32.

        softmax over all keys of the mean logit of some queries: of a single query its own attention; of all patches
        the attention of their mean query. Where a block attends twice side by side, the mean of both maps.

        Args:
            queries: which of the queries; patches: which of the keys are the patches.
            images: B.
            subtracted: of differential attention (Ye et al. 2024): gives the share of the second map that is taken
                from the first; what is left below 0 counts as 0.
        """
        if not self.calls:
            raise ValueError(
                "the attention that guides masks is read from torch's fused kernels: unset TIMM_FUSED_ATTN."
            )
        maps = []
        with torch.no_grad(), torch.autocast(self.calls[0][0].device.type, enabled=False):  # or products run in half
            for q, k, bias in self.calls:
                query = q[..., queries, :].float().mean(-2, keepdim=True)
                logits = query @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
                if bias is not None:
                    logits = logits + bias[..., queries, :].float().mean(-2, keepdim=True)
                by_head = logits.softmax(dim=-1).unflatten(0, (images, -1)).flatten(1, -2)  # SAM's come as (B H, 1, T)
                maps.append(by_head.mean(dim=1)[:, patches])
            if subtracted is not None:
                return (maps[0] - subtracted() * maps[1]).clamp(min=0)
            return torch.stack(maps).mean(dim=0)
