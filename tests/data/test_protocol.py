"""Known and novel: from names to the images of a run."""

import hashlib

import numpy as np
import pytest

from bigtrain.data.protocol import Protocol, check_every_class, expand, halved, in_validation, seeded_choice, split

ANIMALS = ["cat", "dog", "emu"]
DIGITS = list("0123456789")


@pytest.fixture
def animals(write_set):
    """20 images of each animal, 20 of cat and emu together, 20 of nothing annotated."""
    shown = [["cat"], ["dog"], ["emu"], ["cat", "emu"], []]
    return lambda name="set", keep=shown: write_set(
        [(shown[i % 5], b"x") for i in range(100) if shown[i % 5] in keep], classes=ANIMALS, name=name
    )


def test_is_known(animals):
    """An image is known if any of its objects is."""
    known = Protocol.of(ANIMALS, known=["cat"]).is_known(animals())
    assert known.reshape(20, 5).tolist() == [[True, False, False, True, False]] * 20


def test_other_side():
    """Naming the novel classes leaves the rest known, and the other way round."""
    assert Protocol.of(ANIMALS, novel=["dog"]) == Protocol(known=("cat", "emu"), novel=("dog",))
    assert Protocol.of(ANIMALS, known=["emu", "cat", "emu"]) == Protocol(known=("emu", "cat"), novel=("dog",))


@pytest.mark.parametrize(
    ("sides", "sentence"),
    [
        ({}, "neither of --known and --novel"),
        ({"known": ["cat"], "novel": ["dog"]}, "both of --known and --novel"),
        ({"known": ["dgo"]}, r"'dgo' is in neither .* nearest of their 3 classes is dog"),
        ({"novel": ["zebra"]}, r"'zebra' is in neither .* cat, dog, emu"),
        ({"known": ANIMALS}, "all 3 classes are known"),
        ({"novel": ANIMALS}, "all 3 classes are novel"),
    ],
)
def test_wrong_classes(sides, sentence):
    """A wrong choice of known or novel classes is refused, with what is wrong about it."""
    with pytest.raises(ValueError, match=sentence):
        Protocol.of(ANIMALS, **sides)


def test_expand():
    """Named protocols expand to their runs."""
    assert [p.known for p in expand("uni-class", ANIMALS)] == [("cat",), ("dog",), ("emu",)]
    assert [p.novel for p in expand("all-vs-one", ANIMALS)] == [("cat",), ("dog",), ("emu",)]
    halves = ["01234", "56789", "02468", "13579"]  # DEFEND, table 5
    assert ["".join(p.known) for p in expand("half-vs-half", DIGITS)] == halves
    assert all(sorted(p.known + p.novel) == DIGITS for p in expand("half-vs-half", DIGITS))


@pytest.mark.parametrize(("name", "classes"), [("half-vs-half", ANIMALS), ("one-vs-all", ANIMALS)])
def test_impossible_protocol(name, classes):
    """An unknown protocol, or one that does not fit the classes, is refused."""
    with pytest.raises(ValueError, match=r"is defined on ten classes|there are uni-class, all-vs-one, half-vs-half"):
        expand(name, classes)


def divide(train, test, protocol=None, **changes):
    protocol = protocol or Protocol.of(ANIMALS, known=["cat"])
    return split(protocol, train, test, **{"validation_share": 0.2, "seed": 0, **changes})


def test_split(animals):
    """Training and validation partition the known images, and the test split keeps every image."""
    parts = divide(animals("train"), animals("test"))
    assert not set(parts.fitted_N) & set(parts.held_out_N)
    both = sorted([*parts.fitted_N, *parts.held_out_N])
    assert both == [i for i in range(100) if i % 5 in (0, 3)]
    assert 1 <= len(parts.held_out_N) <= 20
    assert parts.test_N.tolist() == list(range(100))


def test_limits(animals):
    """Limits choose training images at random by seed, and the same test images for every seed."""
    train, test = animals("train"), animals("test")
    one, again, other = (divide(train, test, seed=s, train_limit=10, test_limit=30) for s in (0, 0, 1))
    assert (len(one.fitted_N), len(one.test_N)) == (10, 30)
    assert one.fitted_N.tolist() == again.fitted_N.tolist() == sorted(one.fitted_N)
    assert one.fitted_N.tolist() != other.fitted_N.tolist()
    assert one.test_N.tolist() == other.test_N.tolist() == sorted(one.test_N)
    assert one.test_N.tolist() != list(range(30))


def test_limit_beyond_size():
    """A limit takes at most what there is, and 0 is no limit."""
    assert seeded_choice(np.arange(5), 9, 0).tolist() == seeded_choice(np.arange(5), 0, 0).tolist() == list(range(5))


def test_one_sided_test_split(animals):
    """A test split without novel or without known images is refused: novelty cannot be evaluated on it."""
    train = animals("train")
    for side, kept in (("novel", [["cat"]]), ("known", [["dog"], []])):
        with pytest.raises(ValueError, match=f"has no {side} images among the"):
            divide(train, animals(side, kept))


def test_limit_too_small(animals):
    """A test limit that leaves the known or the novel side without images is refused."""
    with pytest.raises(ValueError, match=r"has no (known|novel) images among the 1 to judge on"):
        divide(animals("train"), animals("test"), test_limit=1)


def test_no_known_images(animals):
    """A training split without known images is refused."""
    with pytest.raises(ValueError, match=r"no image of the known classes \(cat\) to train on"):
        divide(animals("train", [["dog"], ["emu"]]), animals("test"))


def test_class_only_in_test(animals, write_set):
    """A class that is only in the test shards may be novel, and is refused as known."""
    test = write_set([(["gnu"], b"x"), (["cat"], b"x")], name="test")
    both, train = [*ANIMALS, "gnu"], animals("train")
    assert divide(train, test, Protocol.of(both, known=["cat"])).test_N.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"known classes gnu are not in the training shards"):
        divide(train, test, Protocol.of(both, known=["cat", "gnu"]))


KEYS = [f"class/{i:05d}" for i in range(4000)]


def test_held_out_share():
    """The held-out share is exactly what was asked, in each class too; a greater one includes a smaller one's."""
    classes = np.array([0, 1, 1, 1] * 1000)
    for share in (0.0, 0.1, 0.5, 0.9):
        held_out = in_validation(KEYS, classes, share=share, seed=0)
        assert held_out.mean() == share
        assert held_out[classes == 0].mean() == share
    low, high = (in_validation(KEYS, classes, share=s, seed=0) for s in (0.1, 0.3))
    assert (high | ~low).all()  # a greater share keeps what the smaller one held out
    three = in_validation(["a", "b", "c"], np.array([0, 0, 1]), share=0.1, seed=0)
    assert three.sum() == 0  # of so few


def test_held_out_by_key():
    """Whether a sample is held out does not depend on the order of the samples."""
    one = np.zeros(len(KEYS), int)
    held_out = dict(zip(KEYS, in_validation(KEYS, one, share=0.3, seed=5), strict=True))
    assert in_validation(KEYS[::-1], one, share=0.3, seed=5).tolist() == [held_out[key] for key in KEYS[::-1]]
    other = in_validation(KEYS, one, share=0.3, seed=6)
    assert 0.3 < np.mean(other != np.array(list(held_out.values()))) < 0.55  # 2 * .3 * .7 = .42 where independent


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_bad_share(share):
    """A held-out share below 0, or of 1 and more, is refused."""
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        in_validation(KEYS, np.zeros(len(KEYS), int), share=share, seed=0)


def test_first_half():
    """The first half by name is known, and numbers before the names do not count."""
    birds = ["001.Wren", "002.Auk", "003.Owl", "004.Jay", "005.Emu"]
    assert Protocol.half("first-half", birds) == Protocol(("002.Auk", "005.Emu"), ("001.Wren", "003.Owl", "004.Jay"))
    folders = ["emu", "auk", "owl", "jay", "wren", "unused"]
    in_order = Protocol.half("first-half", ["auk", "emu", "jay", "owl", "wren"], folder_order=folders)
    assert in_order == Protocol(("auk", "emu"), ("jay", "owl", "wren"))
    with pytest.raises(ValueError, match=r"keeps no order of folders for 3 of the 3 classes \(cat, dog, emu\)"):
        Protocol.half("first-half", ANIMALS, folder_order=())
    assert expand("first-half", ANIMALS) == [Protocol(("cat",), ("dog", "emu"))]
    with pytest.raises(ValueError, match="two classes or more, and there are 1"):
        Protocol.half("first-half", ["cat"])


def test_random_half():
    """A random half depends on the seed and not on the order of the classes."""
    draws = [Protocol.half("random-half", DIGITS, seed=seed) for seed in range(20)]
    assert len({draw.known for draw in draws}) > 15
    assert all(len(draw.known) == 5 and sorted(draw.known + draw.novel) == DIGITS for draw in draws)
    assert Protocol.half("random-half", DIGITS[::-1], seed=3).known == draws[3].known


def test_halved(write_set):
    """Where one set serves both, each known class is halved between training and test."""
    shown = [["cat"]] * 10 + [["dog"]] * 7 + [["emu"]] * 5
    images = write_set([(names, b"x") for names in shown])
    protocol = Protocol.of(ANIMALS, known=["cat", "dog"])
    train_N, test_N = halved(protocol, images, seed=0)
    of_class = [images.classes_of(s)[0] for s in train_N]
    assert (of_class.count("cat"), of_class.count("dog"), of_class.count("emu")) == (5, 4, 0)
    assert sorted([*train_N, *test_N]) == list(range(22)) and train_N.tolist() == sorted(train_N)
    assert halved(protocol, images, seed=1)[0].tolist() != train_N.tolist()
    parts = split(protocol, images, None, validation_share=0.3, seed=0)
    assert sorted([*parts.fitted_N, *parts.held_out_N]) == train_N.tolist() and len(parts.held_out_N)
    assert parts.test_N.tolist() == test_N.tolist()


def test_halved_by_key(animals):
    """Which half an image falls into depends on the seed and its key alone."""
    images, protocol = animals(), Protocol.of(ANIMALS, known=["dog"])
    keys = [images.key(s) for s in range(100) if images.classes_of(s) == ["dog"]]
    by_digest = sorted(keys, key=lambda key: hashlib.blake2b(f"7:{key}".encode(), digest_size=8).digest())
    assert {images.key(s) for s in halved(protocol, images, seed=7)[0]} == set(by_digest[:10])


def test_check_every_class(write_set):
    """A known class without an image to train on is refused by name."""
    images = write_set([(["cat"], b"x"), (["dog"], b"x")], classes=ANIMALS)
    protocol = Protocol(("cat", "emu"), ("dog",))
    with pytest.raises(ValueError, match="1 of the 2 known classes have no image to train on: emu"):
        check_every_class(protocol, images, np.array([0]))
