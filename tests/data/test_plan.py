"""The order of an epoch: every sample once, the same at any world size, from any position on."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.plan import PADDING, Plan, Position, check_divides, sample_seeds

plans = st.builds(
    lambda gaps, per_shard, share, world, seed, shuffle, span_length: (
        Plan(
            np.cumsum(gaps, dtype=np.int64),  # rows of the index that a filter left
            (np.cumsum(gaps) // per_shard).astype(np.int32),
            share * world,
            seed,
            shuffle,
            span_length,
        ),
        world,
    ),
    gaps=st.lists(st.integers(1, 3), min_size=1, max_size=120),
    per_shard=st.integers(1, 12),  # often too many shards to shuffle sample by sample
    share=st.integers(1, 8),
    world=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
    span_length=st.integers(1, 7),
)


def an_epoch(plan, epoch, world_size=1):
    """Global batches of an epoch, put together from the slices of all ranks."""
    for batch in range(plan.batches_per_epoch):
        position = Position(epoch, batch)
        yield np.concatenate([plan.slice(position, rank, world_size) for rank in range(world_size)])


@given(plans, st.integers(0, 5))
def test_each_sample_once(given_plan, epoch):
    """Every sample is read exactly once an epoch."""
    plan, world_size = given_plan
    read = [s for batch in an_epoch(plan, epoch, world_size) for s in batch if s != PADDING]
    assert sorted(read) == plan.sample_N.tolist()


@given(plans, st.integers(0, 5))
def test_any_world_size(given_plan, epoch):
    """Global batches are the same at any world size that divides them."""
    plan, _ = given_plan
    alone = np.stack(list(an_epoch(plan, epoch)))
    for world_size in range(2, plan.global_batch + 1):
        if plan.global_batch % world_size == 0:
            assert np.array_equal(np.stack(list(an_epoch(plan, epoch, world_size))), alone)


@given(plans)
def test_padding(given_plan):
    """Only the end of an epoch is padded, by less than a batch, and `samples_in` counts the rest."""
    plan, world_size = given_plan
    batches = np.concatenate(list(an_epoch(plan, 0, world_size)))
    padding = len(batches) - len(plan.sample_N)
    assert 0 <= padding < plan.global_batch
    assert (batches[len(plan.sample_N) :] == PADDING).all()
    assert PADDING not in batches[: len(plan.sample_N)]
    real = [plan.samples_in(Position(0, b)) for b in range(plan.batches_per_epoch)]
    assert real == [int((batch != PADDING).sum()) for batch in an_epoch(plan, 0)]


@settings(max_examples=30)
@given(plans, st.integers(1, 3))
def test_resume(given_plan, epochs):
    """From every position on, the rest of the training is the same."""
    plan, _ = given_plan
    whole = list(plan.positions(Position(), epochs))
    batches = [plan.batch(p) for p in whole]
    fresh = Plan(plan.sample_N, plan.shard_N, plan.global_batch, plan.seed, plan.shuffle, plan.span_length)
    for step, position in enumerate(whole):
        rest = list(fresh.positions(position, epochs))
        assert rest == whole[step:]
        assert np.array_equal([fresh.batch(p) for p in rest[:3]], batches[step : step + 3])
        assert plan.after(position) == (whole[step + 1] if step + 1 < len(whole) else Position(epochs, 0))


def big_plan(seed=0, **changes):
    sample_N = np.arange(1000)
    return Plan(sample_N, (sample_N // 10).astype(np.int32), **{"global_batch": 10, "seed": seed, **changes})


def test_few_shards():
    """A few shards are shuffled as a whole, sample by sample."""
    sample_N = np.arange(1600)
    order = Plan(sample_N, (sample_N // 100).astype(np.int32), 10).order(0)
    assert len(np.unique(order[:160] // 100)) == 16
    assert (np.diff(order) == 1).mean() < 0.01


def lanes_of(plan, epoch=0):
    """The sequence of each lane of an epoch without padding: shape (G, batches)."""
    return plan.order(epoch).reshape(plan.batches_per_epoch, plan.global_batch).T


def test_many_shards():
    """With many shards, each lane reads spans within single shards, from all over the set."""
    sample_N = np.arange(64_000)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 64, span_length=8)
    lanes = lanes_of(plan)
    follows = np.diff(lanes) == 1
    assert 0.80 < follows.mean() < 0.88  # 7 of 8, less those cut at the ends of shards
    for lane in lanes[:8]:
        runs = np.split(lane, np.flatnonzero(np.diff(lane) != 1) + 1)
        assert max(map(len, runs)) <= 2 * 8  # two spans may be adjacent by chance
        assert len({run[0] // 100 for run in runs}) > 80  # of 640 shards
    for batch in lanes.T[:20]:
        assert len(np.unique(batch // 100)) > 55  # 64 samples of nearly as many shards
    assert not np.array_equal(lanes_of(plan), lanes_of(plan, 1))


def test_span_cuts():
    """In every epoch, spans start at all positions within a shard: their boundaries are not fixed."""
    sample_N = np.arange(64_000)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 64, span_length=8)
    begins = [set(lanes_of(plan, epoch)[:, 1:][np.diff(lanes_of(plan, epoch)) != 1] % 100) for epoch in range(2)]
    assert begins[0] == set(range(100)) == begins[1]


@given(plans, st.integers(0, 3), st.data())
def test_read_ahead_lanes(given_plan, epoch, data):
    """Read-ahead fetches only samples that come later in the same lanes, and none twice."""
    plan, _ = given_plan
    low = data.draw(st.integers(0, plan.global_batch - 1))
    lanes = slice(low, data.draw(st.integers(low + 1, plan.global_batch)))
    first = data.draw(st.integers(0, plan.batches_per_epoch - 1))
    read = set()
    for b in range(first, plan.batches_per_epoch):
        position = Position(epoch, b)
        needed = set(plan.batch(position)[lanes]) - {PADDING}
        ahead = plan.rest_of_spans(position, lanes, since=b - first)
        later = {s for c in range(b + 1, plan.batches_per_epoch) for s in plan.batch(Position(epoch, c))[lanes]}
        assert len(set(ahead)) == len(ahead) and set(ahead) <= later
        again = set(ahead) & read  # spans adjacent by chance: the reader knows what it has
        assert not again or plan.span_length > 1
        read |= needed | set(ahead)


def test_read_ahead_requests():
    """Read-ahead serves nearly all samples: little more than one request per span remains."""
    sample_N = np.arange(20_000)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 8, span_length=10)
    requests, have = 0, set()
    for b in range(plan.batches_per_epoch):
        position = Position(0, b)
        ahead = plan.rest_of_spans(position, slice(0, 8), since=b)
        requests += sum(s not in have for s in plan.batch(position).tolist())
        have |= set(plan.batch(position).tolist()) | set(ahead.tolist())
    assert requests < 1.25 * 20_000 / 10


def test_memory():
    """Fourteen million samples are planned in less than a gigabyte of memory."""
    sample_N = np.arange(14_000_000)
    plan = Plan(sample_N, (sample_N // 1000).astype(np.int32), 4096)
    tracemalloc.start()
    batch = plan.batch(Position(0, 3000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e9
    assert len(np.unique(batch // 1000)) > 3000


def test_distinct_orders():
    """Each epoch and each seed has an order of its own, the same whenever it is asked for."""
    orders = [big_plan(seed).order(epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02
    assert np.array_equal(big_plan(1).order(1), orders[3])


def test_order_has_no_history():
    """The order of an epoch does not depend on which others were asked for before."""
    plan = big_plan()
    third = [plan.order(epoch) for epoch in range(8)][3]
    assert np.array_equal(big_plan().order(3), third)


def test_no_shuffle():
    """Without shuffling the order is that of the index."""
    assert np.array_equal(big_plan(shuffle=False).order(7), np.arange(1000))


def test_indivisible_batch():
    """A batch that does not divide among the processes is refused, with sizes that would."""
    with pytest.raises(ValueError, match=r"10 does not divide among 3 processes: .* 3\.33 images\. Use 9 or 12"):
        big_plan().slice(Position(), 0, 3)
    with pytest.raises(ValueError, match=r"Use 4, or another number of processes"):
        check_divides(3, 4)


@pytest.mark.parametrize(("samples", "batch", "sentence"), [(0, 4, "no samples to read"), (3, 0, "use 1 or more")])
def test_an_empty_plan_is_refused(samples, batch, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan(np.arange(samples), np.zeros(samples, np.int32), batch)


def splitmix64(x):
    """SplitMix64 in plain integers (Steele, Lea & Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 10**9))
def test_sample_seeds(seed, epoch, sample):
    """The seed of a sample is SplitMix64 of the run's seed, the epoch and the sample."""
    by_hand = splitmix64((splitmix64((splitmix64(seed) + epoch) % 2**64) + sample) % 2**64)
    assert int(sample_seeds(seed, epoch, np.array([sample]))[0]) % 2**64 == by_hand


def test_splitmix64_reference():
    """SplitMix64 as these tests compute it is the published generator."""
    # the first output for the seed 1234567, as in the reference implementation's tests
    assert splitmix64(1234567) == 6457827717110365317


def test_sample_seeds_distinct():
    """A sample's seed is the same in any batch; another sample, epoch or run seed gives another."""
    sample_N = np.arange(5000)
    seeds = sample_seeds(3, 1, sample_N)
    assert np.array_equal(sample_seeds(3, 1, sample_N[::-7]), seeds[::-7])
    others = np.concatenate([seeds, sample_seeds(3, 2, sample_N), sample_seeds(4, 1, sample_N)])
    assert len(np.unique(others)) == len(others)


def test_spans_under_way():
    """After a start in mid-epoch, partly read spans are fetched a few at a time, not all at once."""
    sample_N = np.arange(64_000)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 640, span_length=32)
    start = Position(0, 50)
    have = set(plan.rest_of_spans(start, slice(0, 640), since=0).tolist())
    assert 0 < len(have) < 640  # with all 640 lanes it would be some 9 000
    singles = []
    for since in range(50):
        position = Position(0, start.batch + since)
        needed = set(plan.batch(position).tolist())
        singles.append(len(needed - have))
        have |= needed | set(plan.rest_of_spans(position, slice(0, 640), since=since).tolist())
    assert singles[0] > 500 and all(count < 60 for count in singles[40:])  # about 640 / 32 spans begin at each


@given(plans, st.integers(0, 3))
def test_drop_last(given_plan, epoch):
    """With `drop_last`, all batches are full and otherwise unchanged; a plan shorter than one batch is refused."""
    plan, _ = given_plan
    if len(plan.sample_N) < plan.global_batch:
        with pytest.raises(ValueError, match="--batch-norm frozen"):
            replace(plan, drop_last=True)
        return
    full = list(an_epoch(replace(plan, drop_last=True), epoch))
    whole = list(an_epoch(plan, epoch))
    assert len(full) == len(plan.sample_N) // plan.global_batch
    assert all(PADDING not in batch for batch in full)
    np.testing.assert_array_equal(full, whole[: len(full)])


def test_spans_of_one_sample():
    """With spans of one sample, a lane does not read whole shards of 100 in sequence."""
    sample_N = np.arange(6400)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 64, span_length=1)
    lanes = plan.order(0).reshape(plan.batches_per_epoch, 64).T
    assert plan.in_spans and (np.diff(lanes) == 1).mean() < 0.01
