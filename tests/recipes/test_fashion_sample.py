"""The embedded sample of Fashion-MNIST is what it says it is, and can be made again."""

import gzip

import numpy as np
import pytest

from recipes.presets.fashion.make_sample import PER_CLASS, SAMPLE, make_sample, read_idx, write_idx


@pytest.mark.parametrize(("split", "per_class"), [("train", 300), ("t10k", 100)])
def test_balanced_classes(split, per_class):
    """The sample holds equally many images of each class, hardly any of them twice."""
    image_NHW = read_idx(SAMPLE / f"{split}-images-idx3-ubyte.gz")
    label_N = read_idx(SAMPLE / f"{split}-labels-idx1-ubyte.gz")
    assert image_NHW.shape == (10 * per_class, 28, 28)
    assert np.bincount(label_N).tolist() == [per_class] * 10
    assert len(np.unique(image_NHW.reshape(len(image_NHW), -1), axis=0)) > 0.99 * len(image_NHW)


def test_idx_gzip():
    """The sample's files are IDX inside gzip, without a date."""
    for split in PER_CLASS:
        images = (SAMPLE / f"{split}-images-idx3-ubyte.gz").read_bytes()
        labels = (SAMPLE / f"{split}-labels-idx1-ubyte.gz").read_bytes()
        assert gzip.decompress(images)[:4] == b"\x00\x00\x08\x03"
        assert gzip.decompress(labels)[:4] == b"\x00\x00\x08\x01"
        assert images[4:8] == labels[4:8] == b"\x00\x00\x00\x00"


def test_size_and_licence():
    """The sample is small and carries its licence."""
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 3_000_000
    assert "Copyright (c) 2017 Zalando SE" in (SAMPLE / "LICENSE").read_text()


def test_made_again(tmp_path):
    """A sample made from the sample is the sample."""
    # the first 300 of each class among the first 300 of each class are all of them, in the same order
    make_sample(SAMPLE, tmp_path)
    for split in PER_CLASS:
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{split}-{kind}-ubyte.gz"
            assert gzip.decompress((tmp_path / name).read_bytes()) == gzip.decompress((SAMPLE / name).read_bytes())


def test_first_of_each_class(tmp_path):
    """A sample keeps the first images of each class, in the order of the file."""
    rng = np.random.default_rng(0)
    label_N = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), 350))
    number_N11 = np.arange(3500, dtype=np.uint16).astype(np.uint8).reshape(-1, 1, 1)
    for split in PER_CLASS:
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", number_N11)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", label_N)
    make_sample(tmp_path, tmp_path / "sample")
    seen = dict.fromkeys(range(10), 0)
    expected = []
    for position, label in enumerate(label_N.tolist()):
        seen[label] += 1
        if seen[label] <= 100:
            expected.append(position % 256)
    assert read_idx(tmp_path / "sample" / "t10k-images-idx3-ubyte.gz").ravel().tolist() == expected


def test_too_few_images(tmp_path):
    """A source with too few images of a class is refused."""
    for split in PER_CLASS:
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", np.zeros((10, 28, 28), np.uint8))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.arange(10, dtype=np.uint8))
    with pytest.raises(ValueError, match="class 0 has 1 images where 300 are needed"):
        make_sample(tmp_path, tmp_path / "sample")
