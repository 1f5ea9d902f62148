"""PANDA from end to end, on a few pictures and a tiny network."""

import pytest
import torch

import bigtrain
from bigtrain.models.load_network import load_network
from recipes.panda import main
from tests.runs import judged_images, losses, results


@pytest.fixture
def flags(views):
    return [
        *("--train", str(views / "train"), "--test", str(views / "test"), "--network", "test_resnet"),
        *("--no-pretrained", "--image-size", "32", "--resize", "32", "--test-limit", "120", "--train-limit", "60"),
        *("--score-batch", "32", "--batch", "20", "--epochs", "2", "--known", "bag", "--log-every", "1"),
    ]


def test_end_to_end(flags, tmp_path):
    """Known images come closer to their centre by the named layers alone, and the detector scores as the run did."""
    run = tmp_path / "run"
    main([*flags, "--out", str(run)])
    found = losses(run, "adapt")
    assert len(found) == 6 and found[-1] < found[0]
    torch.manual_seed(0)
    before = load_network("test_resnet", pretrained=False).backbone.state_dict()
    after = load_network(run / "network.safetensors").backbone.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"layer3", "layer4"}
    judged, images = judged_images(run)
    assert bigtrain.load_detector(run / "detector", device="cpu").score(images).tolist() == judged["score"].tolist()
    plain = {"nearest neighbour on pixels", "nearest neighbour on features of the given network"}
    assert set(results(run)["comparisons"]) == plain


def test_continues(flags, tmp_path, capsys):
    """A run whose network is adapted and that was not judged goes on to be judged, with the same scores."""
    run = tmp_path / "run"
    main([*flags, "--out", str(run)])
    scores, network = (run / "scores.parquet").read_bytes(), (run / "network.safetensors").read_bytes()
    (run / "results.json").unlink()
    main([*flags, "--out", str(run)])
    assert (run / "scores.parquet").read_bytes() == scores and (run / "network.safetensors").read_bytes() == network
    main([*flags, "--out", str(run)])
    assert "this run is finished" in capsys.readouterr().out.splitlines()[-1]


def test_unknown_layer(flags, tmp_path, capsys):
    """A layer that the network has not got is refused before anything is written."""
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--tuned-layers", "layer9", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "--tuned-layers names layer9, and the network has" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
