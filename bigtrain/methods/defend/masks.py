"""Which patches the student sees (DEFEND 3.2): drawn for each sample by its own seed, on any device alike.

One polarity: `visible` is True where the student sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigtrain.choices import Keep

FLOOR = 1e-6  # in half precision attention reaches 0, and a patch must never be impossible to draw


def visible_count(patches: int, mask_ratio: float) -> int:
    """How many patches of an image a student sees: round((1 - mask_ratio) N), at least one."""
    return max(1, round((1 - mask_ratio) * patches))


def visible_patches(
    attention_BN: Tensor, seed_B: Tensor, *, keep: Keep = "attended", mask_ratio: float = 0.5
) -> Tensor:
    """Draw the visible patches of each image, DEFEND eq. 2 (the drawing itself is the authors' code's, not the
    paper's).

    Patches are drawn without replacement with probability proportional to the attention of [CLS] in the teacher's last
    block. keep="attended" shows the drawn ones, which is what the authors' code does ("guided, code" in tables);
    "unattended" hides them, as the paper's Fig. 2 has it ("guided, Fig. 2"); "random" draws all alike.

    Args:
        attention_BN: attention of [CLS] to each patch, >= 0; any scale.
        seed_B: int64, one for each sample (`plan.sample_seeds`), so that a mask belongs to a sample, not to a process.
        mask_ratio: share of the patches that is hidden, 0 <= ratio < 1.

    Returns:
        visible_BN: bool; round((1 - mask_ratio) N), at least one, are True in each row.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}; it must be at least 0 and below 1.")
    patches = attention_BN.shape[1]
    visible = visible_count(patches, mask_ratio)
    weight_BN = torch.ones_like(attention_BN, dtype=torch.float64)
    if keep != "random":
        weight_BN = attention_BN.float().double()
        weight_BN = weight_BN / weight_BN.sum(dim=1, keepdim=True).clamp_min(FLOOR) + FLOOR
    # exponential race (Efraimidis & Spirakis 2006): the smallest -log(u) / w are such a draw
    arrival_BN = -uniform(seed_B, patches).log() / weight_BN
    drawn = patches - visible if keep == "unattended" else visible
    first_BN = torch.zeros_like(arrival_BN, dtype=torch.bool)
    first_BN.scatter_(1, arrival_BN.argsort(dim=1, stable=True)[:, :drawn], True)
    return ~first_BN if keep == "unattended" else first_BN


def complementary_halves(patches: int, pairs: int, device: torch.device | None = None) -> Tensor:
    """What a student sees when a picture is scored by its hidden patches: `pairs` random halves, each followed by its
    complement, so that each patch is hidden once a pair. The same for every picture; bool (2 pairs, N), True where
    visible.

    Raises:
        ValueError: there is one patch, which has no half.
    """
    if patches < 2:
        raise ValueError("a picture of one patch cannot be seen by halves: use larger pictures or --predict visible.")
    attention = torch.ones(pairs, patches, device=device)
    half_PN = visible_patches(attention, torch.arange(pairs, device=device), keep="random", mask_ratio=0.5)
    return torch.stack([half_PN, ~half_PN], dim=1).flatten(0, 1)


def uniform(seed_B: Tensor, count: int) -> Tensor:
    """Numbers in (0, 1), float64, shape (B, count), from counters alone (splitmix64): the same on every device."""
    x = seed_B[:, None] + (torch.arange(1, count + 1, device=seed_B.device) * _signed(0x9E3779B97F4A7C15))
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    return (_shift(x, 11).double() + 0.5) * 2.0**-53


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
