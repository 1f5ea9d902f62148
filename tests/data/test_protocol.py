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


def test_an_image_is_known_if_any_of_its_objects_is(animals):
    known = Protocol.of(ANIMALS, known=["cat"]).is_known(animals())
    assert known.reshape(20, 5).tolist() == [[True, False, False, True, False]] * 20


def test_naming_the_novel_side_leaves_the_rest_known():
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
def test_a_wrong_choice_of_classes_is_refused(sides, sentence):
    with pytest.raises(ValueError, match=sentence):
        Protocol.of(ANIMALS, **sides)


def test_named_protocols_expand_to_their_runs():
    assert [p.known for p in expand("uni-class", ANIMALS)] == [("cat",), ("dog",), ("emu",)]
    assert [p.novel for p in expand("all-vs-one", ANIMALS)] == [("cat",), ("dog",), ("emu",)]
    halves = ["01234", "56789", "02468", "13579"]  # DEFEND, table 5
    assert ["".join(p.known) for p in expand("half-vs-half", DIGITS)] == halves
    assert all(sorted(p.known + p.novel) == DIGITS for p in expand("half-vs-half", DIGITS))


@pytest.mark.parametrize(("name", "classes"), [("half-vs-half", ANIMALS), ("one-vs-all", ANIMALS)])
def test_a_protocol_that_cannot_be_is_refused(name, classes):
    with pytest.raises(ValueError, match=r"is defined on ten classes|there are uni-class, all-vs-one, half-vs-half"):
        expand(name, classes)


def divide(train, test, protocol=None, **changes):
    protocol = protocol or Protocol.of(ANIMALS, known=["cat"])
    return split(protocol, train, test, **{"validation_share": 0.2, "seed": 0, **changes})


def test_training_and_validation_are_the_known_images_once_and_the_test_split_is_whole(animals):
    parts = divide(animals("train"), animals("test"))
    assert not set(parts.fitted_N) & set(parts.held_out_N)
    both = sorted([*parts.fitted_N, *parts.held_out_N])
    assert both == [i for i in range(100) if i % 5 in (0, 3)]
    assert 1 <= len(parts.held_out_N) <= 20
    assert parts.test_N.tolist() == list(range(100))


def test_limits_choose_at_random_by_seed_and_the_test_images_are_the_same_for_every_seed(animals):
    train, test = animals("train"), animals("test")
    one, again, other = (divide(train, test, seed=s, train_limit=10, test_limit=30) for s in (0, 0, 1))
    assert (len(one.fitted_N), len(one.test_N)) == (10, 30)
    assert one.fitted_N.tolist() == again.fitted_N.tolist() == sorted(one.fitted_N)
    assert one.fitted_N.tolist() != other.fitted_N.tolist()
    assert one.test_N.tolist() == other.test_N.tolist() == sorted(one.test_N)
    assert one.test_N.tolist() != list(range(30))


def test_a_limit_takes_at_most_what_there_is():
    assert seeded_choice(np.arange(5), 9, 0).tolist() == seeded_choice(np.arange(5), 0, 0).tolist() == list(range(5))


def test_a_test_split_on_which_nothing_can_be_judged_is_refused(animals):
    train = animals("train")
    for side, kept in (("novel", [["cat"]]), ("known", [["dog"], []])):
        with pytest.raises(ValueError, match=f"has no {side} images among the"):
            divide(train, animals(side, kept))


def test_a_limit_that_leaves_one_side_without_images_is_refused(animals):
    with pytest.raises(ValueError, match=r"has no (known|novel) images among the 1 to judge on"):
        divide(animals("train"), animals("test"), test_limit=1)


def test_a_training_split_without_known_images_is_refused(animals):
    with pytest.raises(ValueError, match=r"no image of the known classes \(cat\) to train on"):
        divide(animals("train", [["dog"], ["emu"]]), animals("test"))


def test_a_known_class_without_training_shards_is_refused_and_a_novel_one_is_not(animals, write_set):
    test = write_set([(["gnu"], b"x"), (["cat"], b"x")], name="test")
    both, train = [*ANIMALS, "gnu"], animals("train")
    assert divide(train, test, Protocol.of(both, known=["cat"])).test_N.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"known classes gnu are not in the training shards"):
        divide(train, test, Protocol.of(both, known=["cat", "gnu"]))


KEYS = [f"class/{i:05d}" for i in range(4000)]


def test_the_held_out_share_is_about_what_was_asked():
    for share in (0.0, 0.1, 0.5):
        held_out = in_validation(KEYS, share=share, seed=0)
        assert abs(held_out.mean() - share) <= 4 * (share * (1 - share) / len(KEYS)) ** 0.5
    low, high = (in_validation(KEYS, share=s, seed=0) for s in (0.1, 0.3))
    assert (high | ~low).all()  # a greater share keeps what the smaller one held out


def test_whether_a_sample_is_held_out_depends_on_its_key_and_the_seed_alone():
    held_out = dict(zip(KEYS, in_validation(KEYS, share=0.3, seed=5), strict=True))
    some = KEYS[::-3]
    assert in_validation(some, share=0.3, seed=5).tolist() == [held_out[key] for key in some]
    other = in_validation(KEYS, share=0.3, seed=6)
    assert 0.3 < np.mean(other != np.array(list(held_out.values()))) < 0.55  # 2 * .3 * .7 = .42 where independent


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="must be at least 0 and below 1"):
        in_validation(KEYS, share=share, seed=0)


def test_the_first_half_by_name_is_known_and_numbers_before_names_do_not_count():
    birds = ["001.Wren", "002.Auk", "003.Owl", "004.Jay", "005.Emu"]
    assert Protocol.half("first-half", birds) == Protocol(("002.Auk", "005.Emu"), ("001.Wren", "003.Owl", "004.Jay"))
    assert expand("first-half", ANIMALS) == [Protocol(("cat",), ("dog", "emu"))]
    with pytest.raises(ValueError, match="two classes or more, and there are 1"):
        Protocol.half("first-half", ["cat"])


def test_a_random_half_goes_by_the_seed_and_not_by_the_order_of_the_classes():
    draws = [Protocol.half("random-half", DIGITS, seed=seed) for seed in range(20)]
    assert len({draw.known for draw in draws}) > 15
    assert all(len(draw.known) == 5 and sorted(draw.known + draw.novel) == DIGITS for draw in draws)
    assert Protocol.half("random-half", DIGITS[::-1], seed=3).known == draws[3].known


def test_one_set_serves_both_known_images_are_halved_in_each_class(write_set):
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


def test_which_half_goes_by_seed_and_key_alone(animals):
    images, protocol = animals(), Protocol.of(ANIMALS, known=["dog"])
    keys = [images.key(s) for s in range(100) if images.classes_of(s) == ["dog"]]
    by_digest = sorted(keys, key=lambda key: hashlib.blake2b(f"7:{key}".encode(), digest_size=8).digest())
    assert {images.key(s) for s in halved(protocol, images, seed=7)[0]} == set(by_digest[:10])


def test_a_known_class_without_an_image_to_train_on_is_refused(write_set):
    images = write_set([(["cat"], b"x"), (["dog"], b"x")], classes=ANIMALS)
    protocol = Protocol(("cat", "emu"), ("dog",))
    with pytest.raises(ValueError, match="1 of the 2 known classes have no image to train on: emu"):
        check_every_class(protocol, images, np.array([0]))
