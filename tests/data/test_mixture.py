"""Mixtures: each source keeps the order, the views and the state that it has alone."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.data.mixture import Mixture, divided
from bigtrain.data.plan import PADDING, Plan, Position
from bigtrain.data.stream import Stream
from bigtrain.data.views import RandomResizedCrop

STEPS = 9


@pytest.fixture
def sets(write_set, noise):
    known = write_set([(["a"], noise(i)) for i in range(10)], name="known")
    reference = write_set([(["b"], noise(100 + i)) for i in range(23)], name="reference")
    return {"known": known, "reference": reference}


def streams(sets, **options):
    sizes = {"known": 4, "reference": 6}
    return {
        name: Stream(
            shard_set,
            Plan(np.arange(len(shard_set)), shard_set.shard_N, sizes[name], seed=3),
            RandomResizedCrop(8),
            **options,
        )
        for name, shard_set in sets.items()
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].position == other[name].position
        assert np.array_equal(one[name].sample_B, other[name].sample_B)
        assert torch.equal(one[name].views["image"], other[name].views["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_sources_as_alone(sets, workers):
    """Each source gives the batches that it gives alone, through epochs of its own."""
    mixture = Mixture(streams(sets, workers=workers))
    mixed = list(mixture.batches(mixture.at(0), STEPS))
    assert len(mixed) == STEPS
    for name, stream in streams(sets).items():
        alone = list(islice(stream.batches(epochs=None), STEPS))
        for batches, batch in zip(mixed, alone, strict=True):
            assert_same({name: batches[name]}, {name: batch})
    known = [batches["known"] for batches in mixed]
    assert [batch.position.epoch for batch in known] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for epoch in range(3):
        seen = np.concatenate([batch.sample_B for batch in known if batch.position.epoch == epoch])
        assert sorted(seen[seen != PADDING]) == list(range(10))


def test_resume(sets):
    """Resumed at any step, the rest of the mixture is the same to the bit."""
    mixture = Mixture(streams(sets))
    whole = list(mixture.batches(mixture.at(0), STEPS))
    positions = mixture.at(0)
    for step in range(STEPS):
        assert positions == mixture.at(step)
        for one, other in zip(mixture.batches(positions, STEPS - step), whole[step:], strict=True):
            assert_same(one, other)
        positions = mixture.after(whole[step])


def test_ranks(sets):
    """The ranks' batches put together are those of one process."""
    mixture = Mixture(streams(sets))
    whole = mixture.batches(mixture.at(0), STEPS)
    ranks = [Mixture(streams(sets, rank=rank, world_size=2)) for rank in range(2)]
    for batches, *parts in zip(whole, *(rank.batches(rank.at(0), STEPS) for rank in ranks), strict=True):
        for name, batch in batches.items():
            assert np.array_equal(batch.sample_B, np.concatenate([part[name].sample_B for part in parts]))
            images = torch.cat([part[name].views["image"] for part in parts])
            assert torch.equal(batch.views["image"], images)


def test_wrong_sources(sets):
    """Positions of other sources, and a mixture of none, are refused."""
    mixture = Mixture(streams(sets))
    with pytest.raises(ValueError, match="known, reference, and positions were given for known: reference is on one"):
        next(mixture.batches({"known": Position()}, 1))
    with pytest.raises(ValueError, match="mixture of no streams"):
        Mixture({})


def test_divided_by_hand():
    """A global batch is divided among its sources as worked out by hand."""
    assert divided(64, {"known": 3, "reference": 1}) == {"known": 48, "reference": 16}
    assert divided(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert divided(16, {"a": 2, "b": 1}, world_size=4) == {"a": 12, "b": 4}


@given(
    shares=st.integers(1, 200),
    world_size=st.integers(1, 8),
    ratios=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
)
def test_divided_parts(shares, world_size, ratios):
    """The parts of a batch add up, divide among the ranks and are near their ratios."""
    named = {str(number): ratio for number, ratio in enumerate(ratios)}
    try:
        sizes = divided(shares * world_size, named, world_size)
    except ValueError as error:
        assert "leaves nothing for" in str(error)
        return
    assert sum(sizes.values()) == shares * world_size
    for name, size in sizes.items():
        assert size % world_size == 0 and size > 0
        assert abs(size / world_size - shares * named[name] / sum(ratios)) < 1 + 1e-9


@pytest.mark.parametrize("ratios", [{}, {"a": 0.0}, {"a": 1.0, "b": -1.0}, {"a": float("nan")}])
def test_bad_ratios(ratios):
    """Ratios that are missing, zero, negative or NaN are refused."""
    with pytest.raises(ValueError, match="must be above 0"):
        divided(8, ratios)


def test_batch_too_small():
    """A batch that is too small for all sources, or does not divide among the ranks, is refused."""
    with pytest.raises(ValueError, match="leaves nothing for b"):
        divided(4, {"a": 100, "b": 1})
    with pytest.raises(ValueError, match="does not divide among 3"):
        divided(4, {"a": 1}, world_size=3)
