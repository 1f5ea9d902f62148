"""A teacher's tokens of an image as one row of bytes, exact or rounded, and the attention that guides masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bigtrain.models.vit import Encoded

Kept = Literal["fp32", "bf16", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TokenRows:
    """Rows of L blocks' N tokens of D features.

    "int8" keeps a float32 scale a token, its largest magnitude / 127, and rounds to the nearest of 255 steps. The
    attention is always float32: masks are drawn from it, and stay the same.
    """

    kept: Kept
    blocks: int
    patches: int
    width: int
    with_attention: bool

    @property
    def token_bytes(self) -> int:
        return self.width + 4 if self.kept == "int8" else self.width * DTYPES[self.kept].itemsize

    @property
    def row_bytes(self) -> int:
        return self.blocks * self.patches * self.token_bytes + 4 * self.patches * self.with_attention

    def pack(self, seen: Encoded) -> Tensor:
        """uint8 (B, row_bytes)."""
        tokens_BLND = seen.blocks_LBND.transpose(0, 1)
        if self.kept == "int8":
            scale_BLN1 = tokens_BLND.float().abs().amax(dim=-1, keepdim=True) / 127
            steps_BLND = (tokens_BLND / scale_BLN1.clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8)
            row_B = torch.cat([scale_BLN1.view(torch.uint8), steps_BLND.view(torch.uint8)], dim=-1).flatten(1)
        else:
            row_B = tokens_BLND.to(DTYPES[self.kept]).contiguous().view(torch.uint8).flatten(1)
        if not self.with_attention:
            return row_B
        assert seen.attention_BN is not None
        return torch.cat([row_B, seen.attention_BN.float().contiguous().view(torch.uint8)], dim=1)

    def unpack(self, row_B: Tensor) -> Encoded:
        """What `pack` was given, as far as it was kept; tokens in float32."""
        last = self.blocks * self.patches * self.token_bytes
        token_BLNb = row_B[:, :last].unflatten(1, (self.blocks, self.patches, self.token_bytes))
        if self.kept == "int8":
            scale_BLN1 = token_BLNb[..., :4].contiguous().view(torch.float32)
            tokens_BLND = token_BLNb[..., 4:].contiguous().view(torch.int8) * scale_BLN1
        else:
            tokens_BLND = token_BLNb.contiguous().view(DTYPES[self.kept]).float()
        attention_BN = row_B[:, last:].contiguous().view(torch.float32) if self.with_attention else None
        return Encoded(tokens_BLND.transpose(0, 1), None, attention_BN)
