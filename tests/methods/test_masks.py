"""Which patches the student sees: how many, which ones more often, and that the draw belongs to the sample."""

from itertools import permutations

import numpy as np
import pytest
import torch

from bigtrain.data.plan import sample_seeds
from bigtrain.methods.defend.masks import complementary_halves, uniform, visible_patches

KEEPS = ["attended", "unattended", "random"]


def seeds(count, seed=0):
    return torch.from_numpy(sample_seeds(seed, 0, np.arange(count)))


def attention(images=64, patches=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, patches, generator=generator).mul(2).softmax(dim=1).to(dtype)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("patches", [1, 2, 9, 16, 196])
def test_half_visible(keep, patches):
    """Exactly half of the patches are visible, rounded, and always at least one."""
    visible_BN = visible_patches(attention(32, patches), seeds(32), keep=keep)
    assert visible_BN.sum(dim=1).tolist() == [max(1, round(patches / 2))] * 32


@pytest.mark.parametrize(("ratio", "visible"), [(0.0, 16), (0.25, 12), (0.75, 4), (0.99, 1)])
@pytest.mark.parametrize("keep", KEEPS)
def test_mask_ratio(ratio, visible, keep):
    """The mask ratio is the share of patches that is hidden."""
    assert visible_patches(attention(), seeds(64), keep=keep, mask_ratio=ratio).sum(dim=1).tolist() == [visible] * 64


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_bad_mask_ratio(ratio):
    """A mask ratio below 0, or one that leaves nothing visible, is refused."""
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        visible_patches(attention(), seeds(64), mask_ratio=ratio)


@pytest.mark.parametrize("keep", KEEPS)
def test_equal_attention(keep):
    """With equal attention every patch is visible equally often."""
    count, patches = 20_000, 8
    share_N = visible_patches(torch.full((count, patches), 0.125), seeds(count), keep=keep).double().mean(dim=0)
    # without replacement the counts are correlated by -1/(N-1): a chi-square with N-1 degrees after this factor
    chi_square = (count * (share_N - 0.5).square() / 0.25).sum() * (patches - 1) / patches
    assert chi_square < 24.3  # 99.9 % of 7 degrees of freedom


def chance_to_be_drawn(weight_N, draws):
    """By summing over every order of drawing without replacement."""
    chance_N = np.zeros(len(weight_N))
    for drawn in permutations(range(len(weight_N)), draws):
        chance, left = 1.0, weight_N.sum()
        for i in drawn:
            chance, left = chance * weight_N[i] / left, left - weight_N[i]
        chance_N[list(drawn)] += chance
    return chance_N


@pytest.mark.parametrize(("keep", "drawn"), [("attended", 2), ("unattended", 4)])
def test_draw_without_replacement(keep, drawn):
    """Patches are drawn in proportion to attention, without replacement."""
    weight_N, count = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]), 40_000
    attention_BN = torch.from_numpy(weight_N).float().expand(count, -1) * 3  # of any scale
    visible_BN = visible_patches(attention_BN, seeds(count), keep=keep, mask_ratio=4 / 6)
    chance_N = chance_to_be_drawn(weight_N, drawn)
    expected_N = chance_N if keep == "attended" else 1 - chance_N
    assert visible_BN.double().mean(dim=0).numpy() == pytest.approx(expected_N, abs=4 * (0.25 / count) ** 0.5)


def test_random_ignores_attention():
    """Random masks do not depend on attention."""
    same = visible_patches(torch.ones(64, 16), seeds(64), keep="random")
    assert torch.equal(visible_patches(attention(), seeds(64), keep="random"), same)


@pytest.mark.parametrize("keep", KEEPS)
def test_mask_per_sample(keep):
    """A mask depends on its sample and seed, not on the batch it is drawn in."""
    attention_BN, seed_B = attention(), seeds(64)
    whole = visible_patches(attention_BN, seed_B, keep=keep)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(visible_patches(attention_BN[order], seed_B[order], keep=keep), whole[order])
    assert torch.equal(visible_patches(attention_BN[5:6], seed_B[5:6], keep=keep), whole[5:6])
    assert not torch.equal(visible_patches(attention_BN, seeds(64, seed=1), keep=keep), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", KEEPS)
def test_half_precision(keep, dtype):
    """Attention in half precision gives the same mask as its values in float32."""
    attention_BN = attention(dtype=dtype)
    expected = visible_patches(attention_BN.float(), seeds(64), keep=keep)
    assert torch.equal(visible_patches(attention_BN, seeds(64), keep=keep), expected)


def test_zero_attention():
    """Patches without attention are drawn last, and evenly, but they can be drawn."""
    attention_BN = torch.zeros(2000, 8, dtype=torch.float16)
    attention_BN[:, :2] = 0.5
    visible_BN = visible_patches(attention_BN, seeds(2000))
    assert visible_BN.sum(dim=1).eq(4).all()
    assert visible_BN[:, :2].double().mean() > 0.999
    assert visible_BN[:, 2:].double().mean(dim=0).numpy() == pytest.approx([1 / 3] * 6, abs=0.05)
    nothing = visible_patches(torch.zeros(2000, 8), seeds(2000))
    assert nothing.double().mean(dim=0).numpy() == pytest.approx([0.5] * 8, abs=0.05)


@pytest.mark.parametrize("seed", [0, 1, 1234567, -1, -(2**63), 2**63 - 1])
def test_uniform_numbers_are_splitmix64(seed):
    by_hand = []
    for i in range(1, 6):
        x = (seed + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        by_hand.append(((x >> 11) + 0.5) / 2**53)
    assert uniform(torch.tensor([seed, 7]), 5)[0].tolist() == by_hand
    assert all(0 < u < 1 for u in by_hand)


@pytest.mark.parametrize("patches", [2, 9, 16, 196])
def test_complementary_halves(patches):
    """Each pair hides every patch once, in halves; pairs differ, and asking for fewer gives the first ones."""
    halves_PN = complementary_halves(patches, 5)
    assert halves_PN.shape == (10, patches)
    pairs = halves_PN.unflatten(0, (5, 2))
    assert (pairs[:, 0] ^ pairs[:, 1]).all()
    assert set(halves_PN.sum(dim=1).tolist()) <= {patches // 2, patches - patches // 2}
    assert patches < 16 or len(halves_PN.unique(dim=0)) == 10
    assert torch.equal(complementary_halves(patches, 2), halves_PN[:4])


def test_one_patch_has_no_half():
    with pytest.raises(ValueError, match="one patch cannot be seen by halves"):
        complementary_halves(1, 3)
