"""Mixtures: each source keeps the order, the views and the state that it has alone."""

from itertools import islice

import numpy as np
import pytest
import torch

from bigtrain.data.mixture import Mixture
from bigtrain.data.plan import PADDING, Plan
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
    mixed = list(mixture.from_step(0, STEPS))
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
    whole = list(mixture.from_step(0, STEPS))
    for step in range(STEPS):
        for one, other in zip(mixture.from_step(step, STEPS), whole[step:], strict=True):
            assert_same(one, other)


def test_ranks(sets):
    """The ranks' batches put together are those of one process."""
    mixture = Mixture(streams(sets))
    whole = mixture.from_step(0, STEPS)
    ranks = [Mixture(streams(sets, rank=rank, world_size=2)) for rank in range(2)]
    for batches, *parts in zip(whole, *(rank.from_step(0, STEPS) for rank in ranks), strict=True):
        for name, batch in batches.items():
            assert np.array_equal(batch.sample_B, np.concatenate([part[name].sample_B for part in parts]))
            images = torch.cat([part[name].views["image"] for part in parts])
            assert torch.equal(batch.views["image"], images)


def test_no_sources():
    """A mixture without sources is refused."""
    with pytest.raises(ValueError, match="mixture of no streams"):
        Mixture({})
