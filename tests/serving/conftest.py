"""What the commands are tried on: a finished run, its test pictures as files, broken ones among them."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bigtrain.cli import main
from bigtrain.data.shard_set import ShardSet
from bigtrain.detectors.classical.gaussian import Mahalanobis
from bigtrain.detectors.network_detector import NetworkDetector, Scoring
from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network, build_trunk
from tests.made_once import made_once


@pytest.fixture(scope="session")
def test_rows(finished):
    """The rows of the run's test split."""
    return [row for row in pq.read_table(finished / "scores.parquet").to_pylist() if row["split"] == "test"]


@pytest.fixture(scope="session")
def photos(finished, shards, test_rows, tmp_path_factory):
    """The test pictures as files CLASS/KEY.png, in class folders."""

    def make(folder):
        test = ShardSet(str(shards / "test"))
        sample_of = {key: sample for sample, key in enumerate(test.keys())}
        for row in test_rows:
            place = folder / row["classes"][0]
            place.mkdir(exist_ok=True)
            (place / f"{row['key'].replace('/', '-')}.png").write_bytes(test.read([sample_of[row["key"]]])[0])

    return made_once(tmp_path_factory, "photos", make)


@pytest.fixture
def broken():
    """Name -> bytes that are no picture, or none that can be used."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "JPEG")
    header = io.BytesIO()
    Image.new("1", (40000, 40000)).save(header, "PNG")
    return {
        "empty.png": b"",
        "text.jpg": b"no picture at all",
        "cut.jpg": whole.getvalue()[:300],
        "bomb.png": header.getvalue(),
    }


@pytest.fixture
def command(capsys):
    """command(*words) -> (exit code, standard output, standard error) of `bigtrain`."""

    def run(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def saved(tmp_path):
    """A saved detector without a map: Mahalanobis on a small ResNet, calibrated by 40 scores."""
    torch.manual_seed(0)
    architecture = Architecture("test_resnet")
    network = Network(build_trunk(architecture).eval(), architecture, (0.5,) * 3, (0.3,) * 3)
    scoring = Scoring(image_size=32, resize=36, precision="fp32", batch=8, layer="", head="")
    detector = NetworkDetector(network, Mahalanobis(), scoring)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 40, 3), np.uint8) for _ in range(80)]
    views = torch.from_numpy(np.stack([detector.view()(picture_of(image), rng)["image"] for image in images]))
    features_ND = detector.features_of(views).numpy()
    detector.detector.fit(features_ND[:40])
    detector.calibrate(detector.score(images[40:]))
    detector.save(tmp_path / "saved")
    return tmp_path / "saved"


def picture_of(image):
    from bigtrain.data.decode import Picture

    return Picture.of(image)


@pytest.fixture
def record_of():
    return lambda folder: json.loads((folder / "detector.json").read_text())
