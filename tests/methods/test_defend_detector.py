"""A saved detector: the same bits after loading, in any order and grouping, from any kind of picture."""

import copy
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bigtrain
from bigtrain.data.decode import Picture
from bigtrain.data.views import Resized
from bigtrain.methods.defend.detector import DistillationDetector, Scoring
from bigtrain.methods.defend.masks import complementary_halves
from bigtrain.methods.defend.network import masked_student
from bigtrain.methods.defend.together import score_together
from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network
from bigtrain.models.vit import ViT

SMALL = Architecture("vit_tiny_patch16_224", 32, 8, 2)
SCORING = Scoring(
    image_size=32,
    normalisation="l2",
    normalise_student=True,
    distance="squared",
    distilled_blocks=1,
    precision="fp32",
    attention="auto",
    batch=5,
)


def pretrained(vit, mean=(0.5, 0.4, 0.3)):
    return Network(vit.eval().requires_grad_(False), SMALL, mean, (0.5, 0.5, 0.2))


def a_detector(**changes):
    torch.manual_seed(0)
    decoder = 0 if changes.get("predict", "visible") == "visible" else 2
    teacher, student = pretrained(ViT(SMALL.build())), pretrained(masked_student(SMALL, decoder_blocks=decoder))
    return DistillationDetector(teacher, student, replace(SCORING, **changes))


@pytest.fixture
def detector():
    return a_detector()


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + i, 30, 3), np.uint8)) for i in range(12)]


VARIANTS = [
    {},
    {"precision": "bf16"},
    {"distilled_blocks": 2, "normalisation": "none", "distance": "smooth_l1"},
    {"normalise_student": False, "batch": 1},
    {"predict": "hidden", "score_pairs": 2},
    {"predict": "all", "score_pairs": 1, "distilled_blocks": 2},
    {"score_over": "attended"},
    {"score_over": "quantile", "score_quantile": 0.1},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_save_load_same_bits(tmp_path, pictures, changes):
    """A loaded detector scores the same bits."""
    detector = a_detector(**changes)
    before, maps = detector.score(pictures), detector.score_map(pictures)
    detector.calibrate(before)
    detector.save(tmp_path / "detector")
    loaded = bigtrain.load_detector(tmp_path / "detector", device="cpu")
    assert loaded.scoring == detector.scoring
    assert (loaded.teacher.mean, loaded.teacher.std) == (detector.teacher.mean, detector.teacher.std)
    assert np.array_equal(loaded.score(pictures), before)
    assert np.array_equal(loaded.score_map(pictures), maps)
    assert np.array_equal(bigtrain.load_detector(str(tmp_path / "detector"), device="cpu").score(pictures), before)
    assert before.std() > 0


def test_older_detector(tmp_path, pictures):
    """A detector that was saved before students predicted hidden patches scores what it did."""
    detector = a_detector()
    expected = detector.score(pictures)
    detector.save(tmp_path / "detector")
    record = json.loads((tmp_path / "detector" / "detector.json").read_text())
    later = ("predict", "score_pairs", "score_over", "score_quantile")
    older = {name: value for name, value in record.items() if name not in later}
    (tmp_path / "detector" / "detector.json").write_text(json.dumps(older))
    loaded = bigtrain.load_detector(tmp_path / "detector", device="cpu")
    assert len(older) == len(record) - 4 and np.array_equal(loaded.score(pictures), expected)


@pytest.mark.parametrize("predict", ["hidden", "all"])
@torch.no_grad()
def test_score_by_halves(predict):
    """A patch's score is its mean error over the halves that hide it; the picture's is the mean."""
    detector = a_detector(predict=predict, score_pairs=3)
    teacher, student = detector.teacher, detector.student
    image_B3HW = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    x_B3HW = teacher.normalise(image_B3HW)
    target_BND = F.normalize(teacher.vit(x_B3HW)[0].tokens_BND, dim=-1)
    errors = [[[] for _ in range(16)] for _ in range(4)]
    for visible_N in complementary_halves(16, 3):
        found_BND = F.normalize(student.vit(x_B3HW, visible_BN=visible_N.expand(4, -1))[0].tokens_BND, dim=-1)
        for picture in range(4):
            for patch in range(16):
                if not visible_N[patch]:
                    error = (found_BND[picture, patch] - target_BND[picture, patch]).square().sum().item()
                    errors[picture][patch].append(error)
    expected = [[sum(those) / len(those) for those in patches] for patches in errors]
    found = detector.score_tensor(image_B3HW)
    torch.testing.assert_close(found.map_Bhw.flatten(1), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.score_B, torch.tensor(expected).mean(dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("over", ["mean", "quantile", "attended"])
@torch.no_grad()
def test_score_over(over):
    """The picture's score is taken of its map as asked; attended patches are those of the teacher's [CLS]."""
    detector = a_detector(score_over=over)
    image_B3HW = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    found = detector.score_tensor(image_B3HW)
    map_BN = found.map_Bhw.flatten(1)
    x_B3HW = detector.teacher.normalise(image_B3HW)
    attention_BN = detector.teacher.vit(x_B3HW, with_attention=True)[0].attention_BN
    attended = torch.stack([m[a.argsort(descending=True)[:8]] for m, a in zip(map_BN, attention_BN, strict=True)])
    expected = {"mean": map_BN.mean(1), "quantile": map_BN.quantile(0.25, 1), "attended": attended.mean(1)}
    torch.testing.assert_close(found.score_B, expected[over])
    assert len({tuple(value.tolist()) for value in expected.values()}) == 3


@torch.no_grad()
def test_constant_student():
    """The floor: the distance to tokens that are the same for every picture; the mean target minimises it."""
    detector = a_detector(predict="hidden")
    image_B3HW = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    target_BLND = detector.target(image_B3HW)
    assert target_BLND.shape == (6, 1, 16, 192)
    torch.testing.assert_close(target_BLND.norm(dim=-1), torch.ones(6, 1, 16))
    constant_ND = F.normalize(target_BLND[:, 0].mean(0), dim=-1)
    expected_B = (target_BLND[:, 0] - constant_ND).square().sum(-1).mean(1)
    score_B = detector.constant_score(image_B3HW, target_BLND.mean(0))
    torch.testing.assert_close(score_B, expected_B)
    other_LND = target_BLND.mean(0) + 0.05 * torch.randn(1, 16, 192, generator=torch.Generator().manual_seed(0))
    assert score_B.mean() < detector.constant_score(image_B3HW, other_LND).mean()


def test_order_and_grouping(detector, pictures):
    """A picture scores the same bits in any order and grouping."""
    together = detector.score(pictures)
    assert np.array_equal(detector.score(pictures[::-1]), together[::-1])
    assert np.array_equal(np.concatenate([detector.score([picture]) for picture in pictures]), together)
    assert np.array_equal(detector.score(picture for picture in pictures[3:]), together[3:])


def test_fixed_batch_shape(detector, pictures, monkeypatch):
    """Every forward pass has the shape it had in training, the last batch too."""
    shapes, score_tensor = [], detector.score_tensor
    monkeypatch.setattr(detector, "score_tensor", lambda image: [shapes.append(image.shape), score_tensor(image)][1])
    assert len(detector.score(pictures)) == 12
    assert shapes == [(5, 3, 32, 32)] * 3  # a kernel's rounding can depend on it


def test_input_kinds(detector, pictures, tmp_path):
    """Paths, arrays and pictures are the same input, and grey is taken as RGB."""
    pictures[0].save(tmp_path / "0.png")
    inputs = [pictures[0], np.asarray(pictures[0]), tmp_path / "0.png", str(tmp_path / "0.png")]
    scores = detector.score(inputs)
    assert len(set(scores.tolist())) == 1
    grey = Image.new("L", (9, 9), 77)
    assert detector.score([grey, np.asarray(grey)]).tolist() == detector.score([grey.convert("RGB")] * 2).tolist()


def test_score_map(detector, pictures):
    """The score is the mean of its map, and the map is the distance between the two networks' tokens."""
    scores, maps = detector.score(pictures[:2]), detector.score_map(pictures[:2])
    assert (scores.dtype, maps.shape) == (np.float64, (2, 4, 4))
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), scores, rtol=1e-5)
    image = torch.from_numpy(Resized(32)(Picture.of(pictures[1]), np.random.default_rng(0))["image"])[None] / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.5, 0.2]).view(3, 1, 1)
    tokens = []
    for network in (detector.teacher, detector.student):
        token_ND = network.vit.backbone.forward_features((image - mean) / std)[0, 1:]
        tokens.append(token_ND / token_ND.norm(dim=1, keepdim=True))
    expected = (tokens[0] - tokens[1]).square().sum(dim=1).view(4, 4)
    np.testing.assert_allclose(maps[1], expected.numpy(), rtol=1e-4)


def test_no_pictures_have_no_scores(detector):
    assert detector.score([]).shape == (0,)
    assert detector.score_map([]).shape == (0, 4, 4)


def test_student_is_teacher(detector, pictures):
    """A student that is the teacher finds nothing novel: every score is zero."""
    same = DistillationDetector(detector.teacher, detector.teacher, SCORING)
    assert not same.score(pictures).any()


def test_threshold(detector):
    """The threshold is one of the known scores, the first that the quantile does not exceed."""
    known = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    assert detector.calibrate(known) == 96  # the quantile lies between 95 and 96
    assert (detector.scoring.threshold, detector.scoring.threshold_quantile) == (96, 0.95)
    assert detector.calibrate(known, quantile=0.5) == 51
    assert (known <= detector.scoring.threshold).mean() >= 0.5
    assert detector.calibrate(np.array([2.5])) == 2.5


def test_threshold_without_images(detector):
    """Without held-out images there is no threshold."""
    assert detector.calibrate(np.zeros(0)) is None
    assert detector.scoring.threshold is None


def test_load_refuses(detector, tmp_path):
    """A folder without a detector and a detector of an unknown method are refused."""
    with pytest.raises(ValueError, match=r"holds no detector\.json: give the folder"):
        bigtrain.load_detector(tmp_path)
    detector.save(tmp_path / "detector")
    record = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert record.items() >= {"method": "defend", "version": 2, **asdict(detector.scoring)}.items()
    (tmp_path / "detector" / "detector.json").write_text(json.dumps({**record, "method": "oracle"}))
    with pytest.raises(ValueError, match="is of method 'oracle'; this bigtrain loads defend"):
        bigtrain.load_detector(tmp_path / "detector")


def test_earlier_version(detector, pictures, tmp_path):
    """A detector of version 1, without hashes and held-out scores, loads; a newer one is refused."""
    detector.save(tmp_path / "detector")
    file = tmp_path / "detector" / "detector.json"
    record = json.loads(file.read_text())
    old = {k: v for k, v in record.items() if k not in ("files", "calibration", "bigtrain", "pictures")} | {
        "version": 1
    }
    file.write_text(json.dumps(old))
    loaded = bigtrain.load_detector(tmp_path / "detector", device="cpu")
    assert (
        np.array_equal(loaded.score(pictures), detector.score(pictures)) and loaded.judge(pictures)[0].p_value is None
    )
    file.write_text(json.dumps({**record, "version": 3}))
    with pytest.raises(ValueError, match="is of version 3, and this bigtrain reads versions up to 2"):
        bigtrain.load_detector(tmp_path / "detector")


def test_changed_files(detector, tmp_path):
    """A file that was changed, cut or not copied is refused by its name."""
    detector.save(tmp_path / "detector")
    file = tmp_path / "detector" / "student.safetensors"
    whole = file.read_bytes()
    for changed in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:1000]):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"student\.safetensors is not the file that was saved with it"):
            bigtrain.load_detector(tmp_path / "detector", device="cpu")
    record = tmp_path / "detector" / "detector.json"
    said = json.loads(record.read_text())
    del said["files"]["student.safetensors"]
    for files, why in ((None, "is no record"), ({**said["files"], "../x": "0"}, "which is not beside it")):
        record.write_text(json.dumps({**said, "files": files}))
        with pytest.raises(ValueError, match=why):
            bigtrain.load_detector(tmp_path / "detector", device="cpu")
    del said["files"]
    record.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="lacks the hashes of its files"):
        bigtrain.load_detector(tmp_path / "detector", device="cpu")


def test_lacking_files(detector, tmp_path):
    """A folder that was copied in part is refused by the file that it lacks."""
    detector.save(tmp_path / "detector")
    (tmp_path / "detector" / "student.safetensors").unlink()
    with pytest.raises(ValueError, match=r"student\.safetensors is missing, so the detector was copied in part"):
        bigtrain.load_detector(tmp_path / "detector", device="cpu")


def test_saved_files(detector, pictures, tmp_path):
    """A saved detector is JSON and safetensors, with no pickle, and saving again replaces it."""
    files = ["detector.json", "student.safetensors", "teacher.safetensors"]
    for batch in (5, 3):
        replaced = DistillationDetector(detector.teacher, detector.student, replace(SCORING, batch=batch))
        replaced.save(tmp_path / "detector")
        assert sorted(path.name for path in (tmp_path / "detector").iterdir()) == files
        assert bigtrain.load_detector(tmp_path / "detector", device="cpu").scoring.batch == batch
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


def test_lazy_names():
    """The package's only lazy name is `load_detector`: another is an AttributeError."""
    with pytest.raises(AttributeError, match="no attribute 'load_detectors'"):
        bigtrain.load_detectors  # noqa: B018


def test_unreadable_pictures(detector, pictures, tmp_path, caplog):
    """A picture that cannot be read scores NaN and is named, and the others score as they do without it."""
    (tmp_path / "frame_17.jpg").write_bytes(b"<html>404</html>")
    scores = detector.score([pictures[0], tmp_path / "frame_17.jpg", pictures[1], b""])
    assert np.isnan(scores).tolist() == [False, True, False, True]
    assert np.array_equal(scores[[0, 2]], detector.score(pictures[:2]))
    assert "frame_17.jpg cannot be scored" in caplog.text and "picture 3 (counted from 0)" in caplog.text
    assert np.isnan(detector.score_map([pictures[0], b""])).all(axis=(1, 2)).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"frame_17\.jpg cannot be scored: not a picture"):
        detector.score([tmp_path / "frame_17.jpg"], unreadable="raise")
    np.testing.assert_allclose(detector.score(pictures[:2], batch=1), scores[[0, 2]], rtol=1e-4)


def test_score_together():
    """Scores of many students are those of each alone, bit for bit, and each teacher sees a batch once."""
    first = a_detector()
    students = [first]
    for seed in (1, 2):
        torch.manual_seed(seed)
        student = copy.deepcopy(first.student)
        for parameter in student.vit.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        students.append(DistillationDetector(copy.deepcopy(first.teacher), student, first.scoring))
    other_teacher = copy.deepcopy(first.teacher)
    next(other_teacher.vit.parameters()).data.add_(0.1)
    students.append(DistillationDetector(other_teacher, first.student, first.scoring))
    images = [np.random.default_rng(n).integers(0, 256, (40, 30, 3), dtype=np.uint8) for n in range(7)]
    calls = []
    for detector in students:
        detector.teacher.vit.register_forward_hook(lambda module, *given: calls.append(module))
    alone = np.stack([detector.score(images) for detector in students])
    calls.clear()
    assert score_together(students, images).tolist() == alone.tolist()
    batches = -(-len(images) // first.scoring.batch)
    assert len(calls) == 2 * batches and len(set(map(id, calls))) == 2


def test_together_different_views():
    """Detectors that see their pictures at different sizes are refused."""
    one = a_detector()
    other = DistillationDetector(one.teacher, one.student, replace(one.scoring, image_size=64))
    with pytest.raises(ValueError, match="must see the same pictures, and these see: Resized"):
        score_together([one, other], [])
