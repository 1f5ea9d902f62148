"""`bigtrain export`: every detector in every format scores as the original, or says why not; without torch too."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bigtrain
from bigtrain.data.views import CentreCrop
from bigtrain.detectors.catalogue import EVERY, ON_LOGITS, detector_class
from bigtrain.detectors.network_detector import NetworkDetector, Scoring
from bigtrain.detectors.scoring_module import ScoringModule
from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network, build_trunk
from bigtrain.serving import export as exporting
from bigtrain.serving.graph import Graph
from bigtrain.serving.table_files import read_table
from tests.launching import ENVIRONMENT, ROOT

WHY_NOT = {"local KNFST": "solves an eigenproblem of its own for each picture, which no graph holds"}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    architecture = Architecture("test_resnet")
    trunk = build_trunk(architecture).eval()
    head = nn.Linear(trunk.num_features, 3)
    return Network(trunk, architecture, (0.5,) * 3, (0.3,) * 3, {"known": head}, {"known": ("a", "b", "c")})


def pictures(count, seed=1):
    """Of three colours, of odd sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 60, (count, 2))
    colours = 80 * np.eye(3)[np.arange(count) % 3]
    images = [rng.normal(100 + colours[n], 40, (*sizes[n], 3)).clip(0, 255).astype(np.uint8) for n in range(count)]
    return [Image.fromarray(image) for image in images]


def fitted(network, name):
    """A detector of the catalogue on features or logits of the network, calibrated."""
    on_head = name in ON_LOGITS
    scoring = Scoring(image_size=32, resize=36, precision="fp32", batch=8, layer="", head="known" if on_head else "")
    detector = NetworkDetector(network, detector_class(name)(), scoring)
    views = [detector.view()(picture(image), RNG)["image"] for image in pictures(90, seed=2)]
    outputs_ND = detector.outputs(torch.from_numpy(np.stack(views))).numpy()
    class_N = np.arange(90) % 3
    if on_head:  # or no picture is classified correctly
        outputs_ND = outputs_ND + 3 * np.eye(3)[class_N]
    detector.detector.fit(outputs_ND, class_N)
    detector.calibrate(detector.score(pictures(40, seed=3)))
    return detector


def picture(image):
    from bigtrain.data.decode import Picture

    return Picture.of(image)


@pytest.mark.parametrize("name", EVERY)
def test_module_scores_alike(network, name):
    """As a torch module each detector scores as itself, or says why it cannot."""
    detector = fitted(network, name)
    if name in WHY_NOT:
        with pytest.raises(ValueError, match=WHY_NOT[name]):
            ScoringModule(detector)
        return
    images = pictures(30)
    views = torch.from_numpy(np.stack([detector.view()(picture(image), RNG)["image"] for image in images]))
    score_B, map_Bhw = detector.as_module()(views)
    expected = detector.score(images)
    assert map_Bhw is None and score_B.dtype == torch.float64
    np.testing.assert_allclose(score_B.numpy(), expected, rtol=1e-5, atol=1e-5 * expected.std())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """220 pictures to compare on."""
    folder = tmp_path_factory.mktemp("real")
    for number, image in enumerate(pictures(220, seed=7)):
        image.save(folder / f"{number:03d}.png")
    return folder


MATRIX = [(name, "onnx") for name in EVERY]
MATRIX += [(name, "openvino") for name in ("Mahalanobis", "nearest neighbours", "OpenMax", "K-extremes")]
MATRIX += [(name, "torch") for name in ("Gaussian mixture", "KNFST", "max softmax")]


@pytest.mark.parametrize(("name", "to"), MATRIX)
def test_matrix(network, real, tmp_path, command, name, to):
    """The exported model scores, calls novel and classifies as the detector; what cannot be exported says why."""
    detector = fitted(network, name)
    detector.save(tmp_path / "d")
    out = tmp_path / f"m{exporting.ENDINGS[to]}"
    code, said, error = command("export", "--detector", tmp_path / "d", "--to", to, "--out", out, "--images", real)
    if name in WHY_NOT:
        assert code == 2 and WHY_NOT[name] in error and not out.exists()
        return
    assert code == 0, said + error
    assert "220 pictures of" in said and "28 of them made grey" in said and "largest difference of score" in said
    tables = []
    for number, path in enumerate((tmp_path / "d", out)):
        table = tmp_path / f"{number}.jsonl"
        assert command("score", "--detector", path, "--images", real, "--out", table, "--device", "cpu")[0] == 0
        tables.append(list(read_table(table)))
    one, two = (np.array([row["score"] for row in table]) for table in tables)
    assert np.abs(one - two).max() <= 1e-4 * one.std()
    assert [row["class"] for row in tables[0]] == [row["class"] for row in tables[1]]
    near = np.abs(one - detector.scoring.threshold) < 1e-4 * one.std()
    assert all(a["novel"] == b["novel"] for a, b, is_near in zip(*tables, near, strict=True) if not is_near)


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The DEFEND run as ONNX, compared on its own test pictures."""
    from bigtrain.cli import main

    out = tmp_path_factory.mktemp("exported") / "run.onnx"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bigtrain.serving.agreement.FEWEST", 60)  # the run was judged on 120, and 400 are asked for
        assert main(["export", "--detector", str(finished), "--to", "onnx", "--out", str(out)]) == 0
    return out


def test_defend_without_torch(exported, finished, photos, tmp_path, command):
    """A process in which torch cannot be imported scores with the export as bigtrain does with the run."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in {'torch', 'torchvision', 'timm', 'accelerate', 'webdataset', 'xformers'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from bigtrain.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    line = ["score", "--detector", exported, "--images", photos, "--out", tmp_path / "e.csv"]
    line += ["--maps", tmp_path / "maps", "--page", tmp_path / "top.html"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, line)], env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert command("score", "--detector", finished, "--images", photos, "--out", tmp_path / "d.csv")[0] == 0
    one, two = (list(read_table(tmp_path / f"{name}.csv")) for name in ("d", "e"))
    scores = np.array([[row["score"] for row in table] for table in (one, two)])
    assert np.abs(scores[0] - scores[1]).max() < 1e-4 * scores[0].std()
    assert [row["path"] for row in one] == [row["path"] for row in two]
    assert len(list((tmp_path / "maps").iterdir())) == len(one) and (tmp_path / "top.html").exists()


def test_outputs_of_the_graph(exported, finished, photos):
    """Any batch; score, p-value and map are separate outputs, raw; what the model keeps says how it was made."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported))
    assert [each.name for each in session.get_outputs()] == ["score", "p_value", "map"]
    detector = bigtrain.load_detector(finished, device="cpu")
    files = sorted(photos.rglob("*.png"))[:9]
    images = np.stack([detector.view()(picture(Image.open(file)), RNG)["image"] for file in files])
    for batch in (1, 2, 9):
        score, p_value, map_Bhw = session.run(None, {"image": images[:batch]})
        np.testing.assert_allclose(score, detector.score(files[:batch]), rtol=1e-5)
        np.testing.assert_allclose(p_value, detector.calibration.p_values(score))
        np.testing.assert_allclose(map_Bhw, detector.score_map(files[:batch]), rtol=1e-4, atol=1e-6)
    record = json.loads(session.get_modelmeta().custom_metadata_map["bigtrain"])
    assert record["input_size"] == [32, 32] and record["method"] == "defend" and record["precision"] == "fp32"
    import onnx

    assert onnx.load(exported).opset_import[0].version == exporting.OPSET


@pytest.mark.parametrize("size", [(48, 50), (31, 90), (300, 200)])
def test_resize_in_the_graph(network, size):
    """Pictures of a stated size are resized and cropped in the graph to the very bits that the view has."""
    detector = fitted(network, "Mahalanobis")
    graph = Graph(detector, size)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    view = CentreCrop(32, 36)(picture(Image.fromarray(image)), RNG)["image"]
    resized = graph.resize(torch.from_numpy(image).permute(2, 0, 1)[None])
    np.testing.assert_array_equal(resized[0].numpy(), view)


def test_shifted_scores_are_refused(finished, tmp_path, command, monkeypatch):
    """In fewer bits a shift of all scores leaves the AUROC as it is; what the threshold then flags refuses it."""
    monkeypatch.setattr("bigtrain.serving.agreement.FEWEST", 60)
    before = exporting.Graph.forward

    def shifted(self, image_B3HW):
        score, *further = before(self, image_B3HW)
        return (score + 1.0, *further)

    out = ["--to", "onnx", "--precision", "fp16", "--out", tmp_path / "m.onnx"]
    assert command("export", "--detector", finished, *out)[0] == 0
    (tmp_path / "m.onnx").unlink()
    monkeypatch.setattr(exporting.Graph, "forward", shifted)
    code, said, _ = command("export", "--detector", finished, *out)
    assert code == 4 and "it flags another share of known pictures" in said and not (tmp_path / "m.onnx").exists()


def test_gate_refuses(saved, real, tmp_path, command, monkeypatch):
    """An export that scores otherwise is refused with its table, exit code 4, and leaves nothing."""
    before = exporting.Graph.forward

    def off(self, image_B3HW):
        score, *further = before(self, image_B3HW)
        return (score * 1.001, *further)

    monkeypatch.setattr(exporting.Graph, "forward", off)
    out = tmp_path / "place" / "m.onnx"
    out.parent.mkdir()
    code, said, _ = command("export", "--detector", saved, "--to", "onnx", "--out", out, "--images", real)
    assert code == 4 and "largest difference of score" in said and "is not written: its score differs by" in said
    assert not list(out.parent.iterdir())


MISTAKES = {
    "no run": ([], "lies in no run"),
    "few pictures": (["--images", "FEW"], "compared on at least 200"),
    "fewer asked for": (["--pictures", "50"], "at least 200 are compared"),
    "int8 for torch": (["--precision", "int8", "--to", "torch"], "is not there for --to torch"),
    "wrong ending": (["--out", "m.xml"], "must end in .onnx"),
    "there already": (["--out", "THERE"], "exists: give another name"),
    "no such size": (["--input-size", "0", "5"], "give height and width in pixels"),
    "fp16 without labels": (["--precision", "fp16", "--images", "REAL"], "is not written: whether fp16 is good enough"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, saved, real, tmp_path, command, monkeypatch):
    """One sentence, an exit code that is not 0, and no file."""
    flags, said = MISTAKES[name]
    few, there = tmp_path / "few", tmp_path / "there.onnx"
    few.mkdir()
    (few / "a.png").write_bytes(next(real.iterdir()).read_bytes())
    there.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    places = {"FEW": few, "THERE": there, "REAL": real}
    words = [str(places.get(flag, flag)) for flag in flags]
    before = sorted(tmp_path.iterdir())
    code, out, error = command("export", "--detector", saved, "--to", "onnx", *words)
    assert code in (2, 4) and said in out + error, out + error
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match=r"was not made by `bigtrain export`|cannot be read as"):
        from bigtrain.serving.exported import ExportedDetector

        ExportedDetector.load(there, device="cpu")
