"""What is said of a run's figures before it begins."""

from types import SimpleNamespace

import numpy as np
import pytest

from bigtrain.data.protocol import Protocol, Split, split
from bigtrain.evaluation.intervals import false_alarms
from bigtrain.training.cautions import cautions
from bigtrain.training.read_labelled import Labelled
from shards.build import build
from shards.build_settings import Settings

CONFIG = SimpleNamespace(threshold_percentile=95.0, image_size=8)


@pytest.fixture
def built(tmp_path, noise):
    """built(name, {class: seeds of pictures}) -> the shard set that `bigtrain-shards build` makes of them."""
    from bigtrain.data.shard_set import ShardSet

    def make(name, pictures):
        for class_name, seeds in pictures.items():
            (tmp_path / "in" / name / class_name).mkdir(parents=True)
            for seed in seeds:
                (tmp_path / "in" / name / class_name / f"{name}{seed}.png").write_bytes(noise(seed))
        build(Settings("folder", str(tmp_path / "in" / name), "all"), tmp_path / name)
        return ShardSet(str(tmp_path / name))

    return make


def divided(train, test, known, share=0.2):
    classes = sorted({*train.classes, *test.classes})
    return split(Protocol.of(classes, known=known), train, test, validation_share=share, seed=0)


def said(found, **settings):
    return "\n".join(cautions(SimpleNamespace(**{**vars(CONFIG), **settings}), found))


def test_copies_are_found(built):
    """Copies under other names in other tars are found by content; most of the known ones are refused."""
    train = built("train", {"cat": range(20)})
    few = built("few", {"cat": [0, 100, 101, 102, 103], "dog": range(50, 55)})
    assert "1 of the 10 pictures to judge on are training pictures too" in said(divided(train, few, ["cat"]))
    many = built("many", {"cat": [0, 1, 2, 100], "dog": range(50, 55)})
    with pytest.raises(ValueError, match=r"3 of the 4 known pictures to judge on in .* are training pictures"):
        said(divided(train, many, ["cat"]))


def test_copies_held_out(built):
    """A held-out picture that is a copy of a training picture makes the threshold too low."""
    train = built("train", {"cat": range(10), "tom": range(10)})
    found = divided(train, built("test", {"cat": [90], "tom": [92], "dog": [91]}), ["cat", "tom"], share=0.3)
    shared = len(train.also_in(train, found.held_out_N, found.fitted_N))
    assert shared and f"{shared} of the {len(found.held_out_N)} held-out pictures are copies" in said(found)


def test_too_few(built):
    """One picture, a batch larger than the data, few held-out pictures, a size far above the pictures'."""
    test = built("test", {"cat": [90], "dog": [91]})
    one = divided(built("one", {"cat": [1]}), test, ["cat"], share=0)
    assert "a single picture to train on" in said(one) and "no threshold" in said(one)
    train = divided(built("train", {"cat": range(40)}), test, ["cat"], share=0.5)
    text = said(train, distil_batch=64, image_size=64)
    assert "--distil-batch is 64, larger than the 20 pictures" in text
    assert "rests on 20 held-out pictures: instead of the 5 % asked for" in text
    assert "the pictures are 11 pixels large, and --image-size is 64" in text
    assert "--distil-batch" not in said(train, distil_batch=20)


def test_absent_known_class(built):
    """A known class that no test picture shows is named, with one of nearly its name."""
    train = built("train", {"Cat": range(12), "emu": range(20, 32)})
    test = built("test", {"cat": [90], "emu": [92], "dog": [91]})
    assert "no picture to judge on shows 1 known class: Cat (is it 'cat'?)" in said(
        divided(train, test, ["Cat", "emu"])
    )


def test_validation_pictures(built):
    """Pictures to report a classifier's accuracy on are compared with those it learns from."""
    train, few = built("train", {"cat": range(20)}), built("few", {"cat": [0, *range(100, 109)]})
    said_of = Labelled(("cat",), train, np.arange(20), few, np.arange(10))
    assert "1 of the 10 pictures to report on are training pictures too" in said(said_of)
    same = said_of._replace(held_out=train, held_out_N=np.arange(20))
    assert "20 of the 20 pictures to report on are training pictures too" in said(same)
    assert not said(said_of._replace(held_out_N=np.arange(1, 10)))


def test_false_alarms():
    """The share beyond an order statistic of n uniform scores, simulated."""
    rng = np.random.default_rng(0)
    share = 1 - np.sort(rng.random((200_000, 37)), axis=1)[:, -2]  # one score lies above the threshold
    assert false_alarms(37, 1) == pytest.approx(np.quantile(share, [0.025, 0.975]), rel=0.05)


def test_without_digests(write_set, noise):
    """Sets of an earlier version, whose index has no digests, share the same places of the same shards alone."""
    one = write_set([(["cat"], noise(i)) for i in range(6)])
    everything_N = np.arange(6)
    assert one.also_in(one, everything_N, everything_N[:2]).tolist() == [0, 1]
    none_N = np.empty(0, np.int64)
    found = Split(Protocol(("cat",), ("dog",)), one, one, everything_N[:3], none_N, everything_N[3:])
    assert "training pictures too" not in said(found)
