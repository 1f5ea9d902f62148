"""The order of an epoch: every sample once, the same at any world size, from any position on."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.plan import PADDING, Plan, Position, check_divides, sample_seeds

plans = st.builds(
    lambda gaps, per_shard, share, world, seed, shuffle, run_length: (
        Plan(
            np.cumsum(gaps, dtype=np.int64),  # rows of the index that a filter left
            (np.cumsum(gaps) // per_shard).astype(np.int32),
            share * world,
            seed,
            shuffle,
            run_length,
        ),
        world,
    ),
    gaps=st.lists(st.integers(1, 3), min_size=1, max_size=120),
    per_shard=st.integers(1, 12),  # often more shards than are shuffled whole
    share=st.integers(1, 8),
    world=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
    run_length=st.integers(1, 7),
)


def an_epoch(plan, epoch, world_size=1):
    """Global batches of an epoch, put together from the slices of all ranks."""
    for batch in range(plan.batches_per_epoch):
        position = Position(epoch, batch)
        yield np.concatenate([plan.slice(position, rank, world_size) for rank in range(world_size)])


@given(plans, st.integers(0, 5))
def test_every_sample_is_read_exactly_once_an_epoch(given_plan, epoch):
    plan, world_size = given_plan
    read = [s for batch in an_epoch(plan, epoch, world_size) for s in batch if s != PADDING]
    assert sorted(read) == plan.sample_N.tolist()


@given(plans, st.integers(0, 5))
def test_global_batches_are_the_same_at_any_world_size_that_divides_them(given_plan, epoch):
    plan, _ = given_plan
    alone = np.stack(list(an_epoch(plan, epoch)))
    for world_size in range(2, plan.global_batch + 1):
        if plan.global_batch % world_size == 0:
            assert np.array_equal(np.stack(list(an_epoch(plan, epoch, world_size))), alone)


@given(plans)
def test_only_the_end_of_an_epoch_is_padded(given_plan):
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
def test_from_every_position_on_the_rest_of_the_training_is_the_same(given_plan, epochs):
    plan, _ = given_plan
    whole = list(plan.positions(Position(), epochs))
    batches = [plan.batch(p) for p in whole]
    fresh = Plan(plan.sample_N, plan.shard_N, plan.global_batch, plan.seed, plan.shuffle, plan.run_length)
    for step, position in enumerate(whole):
        assert plan.steps_before(position) == step
        rest = list(fresh.positions(position, epochs))
        assert rest == whole[step:]
        assert np.array_equal([fresh.batch(p) for p in rest[:3]], batches[step : step + 3])
        assert plan.after(position) == (whole[step + 1] if step + 1 < len(whole) else Position(epochs, 0))


def big_plan(seed=0, **changes):
    sample_N = np.arange(1000)
    return Plan(sample_N, (sample_N // 10).astype(np.int32), **{"global_batch": 10, "seed": seed, **changes})


def test_a_few_shards_are_shuffled_whole():
    sample_N = np.arange(1600)
    order = Plan(sample_N, (sample_N // 100).astype(np.int32), 10).order(0)
    assert len(np.unique(order[:160] // 100)) == 16
    assert (np.diff(order) == 1).mean() < 0.01


def lanes_of(plan, epoch=0):
    """The sequence of each lane of an epoch without padding: shape (G, batches)."""
    return plan.order(epoch).reshape(plan.batches_per_epoch, plan.global_batch).T


def test_in_many_shards_each_lane_takes_runs_of_one_shard_from_all_over_the_set():
    sample_N = np.arange(64_000)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 64, run_length=8)
    lanes = lanes_of(plan)
    follows = np.diff(lanes) == 1
    assert 0.80 < follows.mean() < 0.88  # 7 of 8, less those cut at the ends of shards
    for lane in lanes[:8]:
        runs = np.split(lane, np.flatnonzero(np.diff(lane) != 1) + 1)
        assert max(map(len, runs)) <= 2 * 8  # two may follow one another by chance
        assert len({run[0] // 100 for run in runs}) > 80  # of 640 shards
    for batch in lanes.T[:20]:
        assert len(np.unique(batch // 100)) > 55  # 64 samples of nearly as many shards
    assert not np.array_equal(lanes_of(plan), lanes_of(plan, 1))


def test_epochs_cut_the_runs_at_other_places():
    sample_N = np.arange(64_000)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 64, run_length=8)
    begins = [set(lanes_of(plan, epoch)[:, 1:][np.diff(lanes_of(plan, epoch)) != 1] % 100) for epoch in range(2)]
    assert begins[0] == set(range(100)) == begins[1]


@given(plans, st.integers(0, 3), st.data())
def test_what_is_read_ahead_is_what_follows_in_the_same_lanes(given_plan, epoch, data):
    plan, _ = given_plan
    low = data.draw(st.integers(0, plan.global_batch - 1))
    lanes = slice(low, data.draw(st.integers(low + 1, plan.global_batch)))
    first = data.draw(st.integers(0, plan.batches_per_epoch - 1))
    read = set()
    for b in range(first, plan.batches_per_epoch):
        position = Position(epoch, b)
        needed = set(plan.batch(position)[lanes]) - {PADDING}
        ahead = plan.rest_of_runs(position, lanes, since=b - first)
        later = {s for c in range(b + 1, plan.batches_per_epoch) for s in plan.batch(Position(epoch, c))[lanes]}
        assert len(set(ahead)) == len(ahead) and set(ahead) <= later
        again = set(ahead) & read  # chance neighbours of runs: the reader knows what it has
        assert not again or plan.run_length > 1
        read |= needed | set(ahead)


def test_reading_ahead_serves_nearly_all_samples():
    sample_N = np.arange(20_000)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 8, run_length=10)
    requests, have = 0, set()
    for b in range(plan.batches_per_epoch):
        position = Position(0, b)
        ahead = plan.rest_of_runs(position, slice(0, 8), since=b)
        requests += sum(s not in have for s in plan.batch(position).tolist())
        have |= set(plan.batch(position).tolist()) | set(ahead.tolist())
    assert requests < 1.25 * 20_000 / 10


def test_fourteen_million_samples_are_planned_in_little_memory():
    sample_N = np.arange(14_000_000)
    plan = Plan(sample_N, (sample_N // 1000).astype(np.int32), 4096)
    tracemalloc.start()
    batch = plan.batch(Position(0, 3000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e9
    assert len(np.unique(batch // 1000)) > 3000


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [big_plan(seed).order(epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02
    assert np.array_equal(big_plan(1).order(1), orders[3])


def test_the_order_does_not_depend_on_other_epochs_asked_for_before():
    plan = big_plan()
    third = [plan.order(epoch) for epoch in range(8)][3]
    assert np.array_equal(big_plan().order(3), third)


def test_without_shuffling_the_order_is_that_of_the_index():
    assert np.array_equal(big_plan(shuffle=False).order(7), np.arange(1000))


def test_a_batch_that_does_not_divide_says_which_would():
    with pytest.raises(ValueError, match=r"10 does not divide among 3 processes: .* 3\.33 images\. Use 9 or 12"):
        big_plan().slice(Position(), 0, 3)
    with pytest.raises(ValueError, match=r"Use 4, or another number of processes"):
        check_divides(3, 4)


@pytest.mark.parametrize(("samples", "batch", "sentence"), [(0, 4, "no samples to read"), (3, 0, "use 1 or more")])
def test_an_empty_plan_is_refused(samples, batch, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan(np.arange(samples), np.zeros(samples, np.int32), batch)


def splitmix64(x):
    """By plain integers (Steele, Lea & Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 10**9))
def test_seeds_of_samples_are_splitmix64_of_seed_epoch_and_sample(seed, epoch, sample):
    by_hand = splitmix64((splitmix64((splitmix64(seed) + epoch) % 2**64) + sample) % 2**64)
    assert int(sample_seeds(seed, epoch, np.array([sample]))[0]) % 2**64 == by_hand


def test_splitmix64_is_the_published_generator():
    # the first output for the seed 1234567, as in the reference implementation's tests
    assert splitmix64(1234567) == 6457827717110365317


def test_a_sample_has_the_same_seed_in_any_batch_and_another_for_another_sample_epoch_or_seed():
    sample_N = np.arange(5000)
    seeds = sample_seeds(3, 1, sample_N)
    assert np.array_equal(sample_seeds(3, 1, sample_N[::-7]), seeds[::-7])
    others = np.concatenate([seeds, sample_seeds(3, 2, sample_N), sample_seeds(4, 1, sample_N)])
    assert len(np.unique(others)) == len(others)


def test_runs_under_way_are_taken_up_a_few_at_a_time():
    sample_N = np.arange(64_000)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 640, run_length=32)
    start = Position(0, 50)
    have = set(plan.rest_of_runs(start, slice(0, 640), since=0).tolist())
    assert 0 < len(have) < 640  # with all 640 lanes it would be some 9 000
    singles = []
    for since in range(50):
        position = Position(0, start.batch + since)
        needed = set(plan.batch(position).tolist())
        singles.append(len(needed - have))
        have |= needed | set(plan.rest_of_runs(position, slice(0, 640), since=since).tolist())
    assert singles[0] > 500 and all(count < 60 for count in singles[40:])  # about 640 / 32 runs begin at each


@given(plans, st.integers(0, 3))
def test_without_the_last_batch_all_are_full_and_the_samples_before_it_are_the_same(given_plan, epoch):
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


def test_runs_of_one_sample():
    """Each sample is a run of its own: whole shards of 100 do not follow one another in a lane."""
    sample_N = np.arange(6400)
    plan = Plan(sample_N, (sample_N // 100).astype(np.int32), 64, run_length=1)
    lanes = plan.order(0).reshape(plan.batches_per_epoch, 64).T
    assert plan.in_runs and (np.diff(lanes) == 1).mean() < 0.01
