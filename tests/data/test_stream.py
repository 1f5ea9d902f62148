"""The stream: the same bits with any number of workers, at any world size and from any position."""

import logging
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigtrain.data.decode import Picture
from bigtrain.data.error_budget import ErrorBudget
from bigtrain.data.plan import PADDING, Plan, Position
from bigtrain.data.stream import Batch, Stream, joined
from bigtrain.data.views import MultiCrop, Resized

SAMPLES, BATCH, EPOCHS = 20, 6, 2


@pytest.fixture
def pictures(write_set, noise):
    return write_set([(["a"], noise(i)) for i in range(SAMPLES)])


def stream(shard_set, *, shuffle=True, transform=None, batch=BATCH, **options):
    plan = Plan(np.arange(len(shard_set)), shard_set.shard_N, batch, seed=5, shuffle=shuffle, span_length=3)
    return Stream(shard_set, plan, transform or MultiCrop(16, 8, 2), **options)


def assert_same(one, other):
    assert one.position == other.position
    assert one.samples_in_step == other.samples_in_step
    assert np.array_equal(one.sample_B, other.sample_B)
    assert torch.equal(one.weight_B, other.weight_B)
    assert torch.equal(one.seed_B, other.seed_B)
    assert one.views.keys() == other.views.keys()
    for name, view in one.views.items():
        assert view.dtype == other.views[name].dtype and torch.equal(view, other.views[name])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_same_bits(pictures, workers):
    """Workers change neither the order nor a bit."""
    alone = list(stream(pictures).batches(epochs=EPOCHS))
    assert len(alone) == 8
    for one, other in zip(alone, stream(pictures, workers=workers).batches(epochs=EPOCHS), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_put_together(pictures, world_size):
    """The ranks' batches put together are those of one process."""
    streams = [stream(pictures, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(
        stream(pictures).batches(epochs=EPOCHS), *(s.batches(epochs=EPOCHS) for s in streams), strict=True
    ):
        together = Batch(
            parts[0].position,
            parts[0].samples_in_step,
            np.concatenate([part.sample_B for part in parts]),
            torch.cat([part.weight_B for part in parts]),
            torch.cat([part.seed_B for part in parts]),
            {name: torch.cat([part.views[name] for part in parts]) for name in parts[0].views},
        )
        assert_same(whole, together)


def test_resume(pictures):
    """Resumed at any batch, the rest is the same to the bit."""
    whole = list(stream(pictures).batches(epochs=EPOCHS))
    for step, first in enumerate(whole):
        rest = list(stream(pictures).batches(first.position, EPOCHS))
        assert len(rest) == len(whole) - step
        for one, other in zip(rest, whole[step:], strict=True):
            assert_same(one, other)


@pytest.fixture
def many_shards(write_set, noise):
    """Too many shards to shuffle sample by sample: samples are read in spans."""
    return write_set([([str(i % 3)], noise(i)) for i in range(60)], per_shard=3, name="many")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_many_shards_same_bits(many_shards, workers):
    """With samples read in spans, too, workers, ranks and start position do not change a single bit."""
    alone = list(stream(many_shards, batch=8).batches(epochs=EPOCHS))
    assert stream(many_shards).plan.in_spans
    for epoch in range(EPOCHS):
        seen = np.concatenate([batch.sample_B for batch in alone if batch.position.epoch == epoch])
        assert sorted(seen[seen != PADDING]) == list(range(60))
    for one, other in zip(alone, stream(many_shards, batch=8, workers=workers).batches(epochs=EPOCHS), strict=True):
        assert_same(one, other)
    late = alone[11]
    ranks = [stream(many_shards, batch=8, rank=r, world_size=2, workers=workers) for r in range(2)]
    for whole, *parts in zip(alone[11:], *(s.batches(late.position, EPOCHS) for s in ranks), strict=True):
        assert np.array_equal(whole.sample_B, np.concatenate([part.sample_B for part in parts]))
        for name, view in whole.views.items():
            assert torch.equal(view, torch.cat([part.views[name] for part in parts]))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    global_batch=st.sampled_from([2, 4, 6, 12]),
    kept=st.sets(st.integers(0, 59), min_size=1),
    span_length=st.integers(1, 9),
    start=st.integers(0, 200),
    data=st.data(),
)
def test_filtered_once(many_shards, global_batch, kept, span_length, start, data):
    """Each sample that a filter leaves comes once an epoch, with its own views."""
    world_size = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if global_batch % n == 0]))
    sample_N = np.array(sorted(kept))
    plan = Plan(sample_N, many_shards.shard_N[sample_N], global_batch, seed=7, span_length=span_length)
    begin = plan.position_at(start % (EPOCHS * plan.batches_per_epoch))
    ranks = [Stream(many_shards, plan, Resized(4), rank=r, world_size=world_size) for r in range(world_size)]
    seen = [[] for _ in range(EPOCHS)]
    for parts in zip(*(rank.batches(begin, EPOCHS) for rank in ranks), strict=True):
        position = parts[0].position
        together = np.concatenate([part.sample_B for part in parts])
        assert np.array_equal(together, plan.batch(position))
        seen[position.epoch] += together[together != PADDING].tolist()
        for part in parts:
            for sample, image in zip(part.sample_B, part.views["image"], strict=True):
                if sample != PADDING:
                    assert np.array_equal(image, Resized(4)(Picture(many_shards.read([sample])[0]), None)["image"])
    if begin.epoch == 0:
        assert sorted(seen[1]) == sorted(kept)
    if begin == Position():
        assert sorted(seen[0]) == sorted(kept)


def test_a_span_is_read_at_once(many_shards):
    plan = Plan(np.arange(60), many_shards.shard_N, 4, span_length=3)
    asked = []
    one = Stream(many_shards, plan, Resized(4))
    one.shard_set = SimpleNamespace(
        url=many_shards.url,
        reader=lambda: Counting(many_shards.reader(), asked),
        places=many_shards.places,
        key=many_shards.key,
    )
    assert len(list(one.batches())) == 15
    assert sum(asked) == 60  # each sample once
    assert len(asked) < 15 and max(asked) > 4  # often several at once, ahead of their batch


class Counting:
    """A reader that notes how many pictures it is asked for."""

    def __init__(self, reader, asked):
        self.reader, self.asked = reader, asked

    def read(self, shard_N, *further):
        self.asked.append(len(shard_N))
        return self.reader.read(shard_N, *further)

    def __getattr__(self, name):
        return getattr(self.reader, name)


def test_a_batch_tells_what_it_cost(pictures):
    batches = list(stream(pictures, shuffle=False, workers=1).batches())
    total = sum(map(len, pictures.read(list(range(SAMPLES)))))
    assert total <= sum(batch.read_bytes for batch in batches) < total + SAMPLES * 2048  # headers between neighbours
    assert all(batch.wait_s > 0 for batch in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_shard(pictures, workers):
    """A shard that goes missing stops the run with its name, and without a traceback in the message."""
    one = stream(pictures, shuffle=False, workers=workers)
    (Path(pictures.url) / "000003.tar").unlink()
    with pytest.raises(OSError, match=r"000003\.tar") as stop:
        list(one.batches())
    assert "Traceback" not in str(stop.value)


def test_max_workers(pictures):
    """There are never more workers than samples in a rank's batch."""
    assert stream(pictures, workers=50, world_size=2).workers == 3


def test_views_differ_by_epoch(pictures):
    """Views show their own sample, and its crops differ from epoch to epoch."""
    boxes = {}
    for batch in stream(pictures).batches(epochs=EPOCHS):
        for sample, box, image in zip(batch.sample_B, batch.views["boxes"], batch.views["image"], strict=True):
            if sample != PADDING:
                boxes.setdefault(sample, []).append(box)
                resized = Resized(16)(Picture(pictures.read([sample])[0]), np.random.default_rng(0))["image"]
                assert np.array_equal(image.numpy(), resized)
    assert sorted(boxes) == list(range(SAMPLES))
    assert not any(torch.equal(*both) for both in boxes.values())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_once(pictures, world_size):
    """Evaluation sees each picture exactly once, in order, at any world size."""
    read = []
    for rank in range(world_size):
        one = stream(pictures, shuffle=False, transform=Resized(8), rank=rank, world_size=world_size)
        for batch in one.batches():
            seen = batch.sample_B[batch.weight_B.numpy() > 0]
            read += seen.tolist()
            assert seen.tolist() == sorted(seen)
    assert sorted(read) == list(range(SAMPLES))


def test_padding(pictures):
    """Padding ends the epoch, is blank and has weight zero."""
    last = list(stream(pictures).batches())[-1]
    assert last.samples_in_step == 2
    assert (last.sample_B[2:] == PADDING).all()
    assert last.weight_B.tolist() == [1, 1, 0, 0, 0, 0]
    assert not last.views["image"][2:].any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mean_of_ranks(pictures, world_size):
    """The mean of the ranks' means is the mean over the samples of the step."""
    streams = [stream(pictures, rank=rank, world_size=world_size).batches() for rank in range(world_size)]
    for parts in zip(*streams, strict=True):
        means = [part.mean(torch.from_numpy(part.sample_B).double() ** 2, world_size) for part in parts]
        real = [s**2 for part in parts for s in part.sample_B if s != PADDING]
        assert torch.stack(means).mean().item() == pytest.approx(np.mean(real))


def test_bad_picture(write_set, noise, caplog):
    """An undecodable picture is logged once; its slot in the batch stays, blank and with weight zero."""
    samples = [(["a"], noise(i)) for i in range(SAMPLES)]
    samples[7] = (["a"], samples[7][1][:60])
    good, bad = write_set([(["a"], noise(i)) for i in range(SAMPLES)], name="good"), write_set(samples, name="bad")
    with caplog.at_level(logging.WARNING):
        broken = stream(bad)
        batches = list(broken.batches(epochs=EPOCHS))
    for batch, whole in zip(batches, stream(good).batches(epochs=EPOCHS), strict=True):
        assert np.array_equal(batch.sample_B, whole.sample_B)
        assert batch.samples_in_step == whole.samples_in_step
        here = batch.sample_B == 7
        assert batch.weight_B.tolist() == np.where(here, 0, whole.weight_B.numpy()).tolist()
        assert set(batch.bad) == ({7} if here.any() else set())
        for name in set(batch.views) - {"boxes"}:
            assert not batch.views[name][here].any()
            assert torch.equal(batch.views[name][~here], whole.views[name][~here])
    assert sum(7 in batch.bad for batch in batches) == EPOCHS
    assert list(broken.budget.skipped) == ["k7"]
    assert [record.getMessage().startswith("skipped k7 of") for record in caplog.records] == [
        True
    ]  # once, not each epoch


def test_too_many_bad(write_set, noise):
    """More than one per cent of bad pictures stop the run, with a list of them."""
    samples = [(["a"], b"junk" if i in (3, 17) else noise(i)) for i in range(SAMPLES)]
    with pytest.raises(ValueError, match=rf"2 of {SAMPLES} pictures cannot be decoded(.|\n)*k3: (.|\n)*k17: "):
        list(stream(write_set(samples), shuffle=False).batches())


class Keys:
    url = "set"

    def key(self, sample):
        return f"k{sample}"


def counted(budget, samples, bad):
    budget.count(np.array(samples), dict.fromkeys(bad, "damaged: broken"))


def test_bad_in_a_row():
    """A hundred bad pictures in a row stop the run, and ninety-nine do not."""
    budget = ErrorBudget(Keys(), 10**6)
    counted(budget, range(98), range(98))
    counted(budget, [98, PADDING, 99], [98])  # 99 in a row; padding is not a picture, and 99 is good
    counted(budget, range(100, 199), range(100, 199))
    with pytest.raises(ValueError, match=r"100 pictures in a row(.|\n)*k0: (.|\n)*k199: damaged: broken"):
        counted(budget, [199], [199])


def test_budget_per_epoch():
    """The error budget is one per cent of all samples, in each epoch anew."""
    budget = ErrorBudget(Keys(), 500)
    for epoch in range(3):
        for bad in (2, 0, 3):
            budget.agree(epoch, bad)
    with pytest.raises(ValueError, match="6 of 500 pictures cannot be decoded; at most 5 in an epoch"):
        budget.agree(2, 1)


@pytest.mark.parametrize("world_size", [1, 4])
def test_budget_long_run(many_shards, world_size):
    """At any world size a long run within the error budget goes on, and one above it stops."""

    def run(bad):
        plan = Plan(np.arange(60), many_shards.shard_N, 4, seed=3)
        budgets = [ErrorBudget(many_shards, 60, share=0.05) for _ in range(world_size)]
        for position in plan.positions(Position(), 20):
            found = 0
            for rank, budget in enumerate(budgets):
                sample_B = plan.slice(position, rank, world_size)
                here = dict.fromkeys(set(bad) & set(sample_B.tolist()), "damaged: broken")
                found += len(here)
                budget.count(sample_B, here)
            for budget in budgets:
                budget.agree(position.epoch, found)
        return budgets

    assert {key for budget in run([5, 7, 11]) for key in budget.skipped} == {"k5", "k7", "k11"}
    with pytest.raises(ValueError, match="4 of 60 pictures cannot be decoded"):
        run([5, 7, 11, 13])


def test_mistake_in_transform(pictures):
    """A mistake in a transform is not taken for a bad picture."""

    class Broken(Resized):
        def __call__(self, picture, rng):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(stream(pictures, transform=Broken(8)).batches())


def test_indivisible_world_size(pictures):
    """A world size that does not divide the batch is refused before anything is read."""
    with pytest.raises(ValueError, match="6 does not divide among 4 processes"):
        stream(pictures, world_size=4)


def a_batch():
    views = {"image": torch.arange(8).view(4, 2)}
    return Batch(Position(), 8, np.arange(4), torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.arange(10, 14), views)


def test_parts_of_a_batch():
    """The second part holds the second half of every field, and the parts' means add up to (3 + 5 + 7) / 8."""
    batch, value_B = a_batch(), torch.tensor([3.0, 100.0, 5.0, 7.0])
    halves = [batch.part(number, 2) for number in range(2)]
    assert halves[1].sample_B.tolist() == [2, 3] and halves[1].seed_B.tolist() == [12, 13]
    assert halves[1].weight_B.tolist() == [1, 1] and halves[1].views["image"].tolist() == [[4, 5], [6, 7]]
    means = [half.mean(value_B[2 * number :][:2], 1) for number, half in enumerate(halves)]
    assert sum(means).item() == batch.mean(value_B, 1).item() == 15 / 8


def test_batch_moves_whole():
    """Views, weights and seeds move to the device; the sample numbers stay on the CPU."""
    moved = a_batch().to(torch.device("meta"))
    assert {t.device.type for t in (moved.views["image"], moved.weight_B, moved.seed_B)} == {"meta"}
    assert moved.sample_B.tolist() == [0, 1, 2, 3]


def test_from_step(pictures):
    """At 4 steps per epoch, steps 3, 4 and 5 are the last batch of one epoch and the first two of the next."""
    found = [batch.position for batch in stream(pictures).from_step(3, 6)]
    assert found == [Position(0, 3), Position(1, 0), Position(1, 1)]


def test_marks(pictures):
    """A stream marks its progress before and after each batch, and reads in-process by default."""
    marks, behind = [], []
    one = stream(pictures, batch=10, mark=marks.append, behind_batch=lambda: behind.append(len(marks)))
    assert one.workers == 0 and len(list(one.batches())) == 2
    of_batches = [f"{what} batch {b} of epoch 0" for b in range(2) for what in ("got", "was done with")]
    assert marks == [f"began to read {pictures.url}", *of_batches] and behind == [3, 5]


def test_weights_are_float32(pictures):
    """Weights match the losses' dtype, so that a step's mean is not computed in double precision."""
    assert {batch.weight_B.dtype for batch in stream(pictures).batches()} == {torch.float32}


def test_bad_across_ranks(write_set, noise):
    """Bad pictures are summed over ranks: 1 of 20 is allowed; at 2 each rank stops, listing its own."""
    bad = write_set([(["a"], b"junk" if i == 3 else noise(i)) for i in range(SAMPLES)])
    one = stream(bad, shuffle=False, rank=0, world_size=2, batch=10)
    first, *_ = one.batches()
    assert one.keys(first) == ["k0", "k1", "k2", "k3", "k4"] and one.bad(first) == [1]
    assert sum(one.skipped.values()) == 1 and isinstance(one.skipped, Counter)
    one.agree(first, [1])
    with pytest.raises(ValueError, match=r"2 of 20 pictures cannot .* and 99 in a row, are skipped(.|\n)*k3: "):
        one.agree(first, [1])


def test_budget_of_a_rank_that_met_none():
    """A rank without bad pictures stops with the others, and reports none of its own."""
    with pytest.raises(ValueError, match=r"2 of 50 pictures .* this process found: none"):
        ErrorBudget(Keys(), 50).agree(0, 2)


def test_joined_keeps_every_bit():
    """64-bit seeds and 8-bit pixels keep their dtypes when joined, in buffers of the right size: torch.equal ignores
    dtypes, and torch.cat resizes a buffer that is too small."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seed_B = joined([torch.tensor([2**60 + 1]), torch.tensor([5, 7])])
        image_B2 = joined([torch.tensor([[1, 2]], dtype=torch.uint8), torch.tensor([[3, 255]], dtype=torch.uint8)])
    assert seed_B.dtype == torch.int64 and seed_B.tolist() == [2**60 + 1, 5, 7]
    assert image_B2.dtype == torch.uint8 and image_B2.tolist() == [[1, 2], [3, 255]]


class Broken(Resized):
    def __call__(self, picture, rng):
        raise RuntimeError("a bug")


def test_mistake_in_a_worker(pictures):
    """A transform's error in a worker is raised as is, with its traceback, not reported as a killed worker."""
    with pytest.raises(RuntimeError, match=r"Original Traceback(.|\n)*a bug"):
        list(stream(pictures, transform=Broken(8), workers=1).batches())


def test_workers_context(pictures, monkeypatch):
    """Workers fork from a server without threads; forking this process could copy a lock that a thread holds."""
    asked = []
    monkeypatch.setattr("bigtrain.data.stream.worker_context", lambda *preload: asked.append(preload))
    next(stream(pictures, workers=1).batches())
    assert asked == [("bigtrain.data.stream",)]


@pytest.mark.parametrize(
    ("error", "received", "why"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed.", 0, "killed, or out of memory.* Or did it never"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", 2, r"out of memory\? Use fewer --workers\.$"),
        ("DataLoader worker (pid 7): out of shared memory (shm)", 2, "make /dev/shm larger"),
    ],
)
def test_why_a_worker_has_ended(pictures, error, received, why):
    """The error distinguishes a lack of shared memory, a killed worker and one that may never have started."""

    def loader():
        yield from range(received)
        raise RuntimeError(error)

    found = []
    with pytest.raises(OSError, match=why):
        found.extend(stream(pictures, workers=1)._received(loader()))
    assert found == [*range(received)]
