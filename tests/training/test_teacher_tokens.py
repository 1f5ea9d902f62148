"""The teacher's tokens, computed once: for all epochs, and for all figures of a batch."""

import errno
import shutil
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import bigtrain
from bigtrain.methods.defend.compared import CachedTeacherDetector
from bigtrain.models.architecture import Architecture
from bigtrain.models.network import Network
from bigtrain.models.read_weights import read_tensors
from bigtrain.models.vit import ViT
from bigtrain.training.teacher_tokens import TeacherTokens
from recipes.defend import main
from tests.runs import results


@pytest.fixture
def tuned(finished, tmp_path):
    """A run whose teacher is tuned and whose student is to come."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("results.json", "report.html", "scores.parquet", "student.safetensors"):
        (folder / name).unlink()
    for name in ("detector", "checkpoints"):
        shutil.rmtree(folder / name)
    return folder


def test_same_student(finished, small, tuned, capsys):
    """With and without the cache the student is the same but for rounding, and nothing of the cache stays."""
    main([*small, "--out", str(tuned), "--cache-gib", "0"])
    check_alike(finished, tuned)
    assert results(tuned)["auroc"] == pytest.approx(results(finished)["auroc"], abs=2e-3)
    assert not (finished / "teacher_tokens").exists() and not (tuned / "teacher_tokens").exists()


def check_alike(finished, tuned):
    one, two = (read_tensors(run / "student.safetensors")[0] for run in (finished, tuned))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_computed_once(finished, small, tmp_path, monkeypatch):
    """The teacher sees the training pictures once, in several parts, whatever the number of epochs."""
    calls = Counter()
    for name in ("_row", "_encoded"):
        monkeypatch.setattr(TeacherTokens, name, counted(calls, name))
    main([*small, "--out", str(tmp_path / "run"), "--score-batch", "3"])
    assert calls == {"_row": 8, "_encoded": 8}  # batches of 3 of 24 pictures; steps of two epochs
    check_alike(finished, tmp_path / "run")


def test_within_one_epoch(small, tmp_path, monkeypatch):
    """Where no picture comes twice nothing is kept."""
    monkeypatch.setattr(TeacherTokens, "_row", None)
    main([*small, "--distil-epochs", "1", "--out", str(tmp_path / "run")])


def test_no_space(small, tuned, monkeypatch, capsys):
    """A full disk gives an error that says what to do."""

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bigtrain.training.feature_cache.save_tensors", full)
    with pytest.raises(SystemExit) as stop:
        main([*small, "--out", str(tuned)])
    assert stop.value.code == 2 and "computed in each step by --cache-gib 0" in capsys.readouterr().err


def counted(calls, name):
    method = getattr(TeacherTokens, name)

    def call(*given):
        calls[name] += 1
        return method(*given)

    return call


def test_no_room(small, tuned, capsys):
    """Tokens that need more memory than they may take are computed in each step, and the run says so."""
    main([*small, "--out", str(tuned), "--cache-gib", "1e-6"])
    assert "more than --cache-gib 1e-06: they are computed in each step" in capsys.readouterr().out


def test_one_pass_for_all_figures(finished):
    """For all figures of a batch the teacher sees it once; the figures are those of the saved detector."""
    saved = bigtrain.load_detector(finished / "detector", device="cpu")
    detector, calls = CachedTeacherDetector(saved.teacher, saved.student, saved.scoring), []
    saved.teacher.vit.register_forward_hook(lambda *given: calls.append(1))
    constant_LND = torch.zeros(1, 16, saved.teacher.vit.backbone.embed_dim)
    images = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    for image_B3HW in images:
        found = detector.score_tensor(image_B3HW).score_B, detector.constant_score(image_B3HW, constant_LND)
        assert detector.features(image_B3HW).shape == (2, saved.teacher.vit.backbone.embed_dim)
        assert len(calls) == 1
        assert found[0].equal(saved.score_tensor(image_B3HW).score_B)
        assert found[1].equal(saved.constant_score(image_B3HW, constant_LND))
        calls.clear()


def test_several_blocks():
    """Tokens of several blocks and the attention come back from their row as they were."""
    architecture = Architecture("vit_tiny_patch16_224", 32, 8, 4)
    teacher = Network(ViT(architecture.build()).eval(), architecture, (0.5,) * 3, (0.5,) * 3)
    own = SimpleNamespace(
        setup=SimpleNamespace(autocast=nullcontext), teacher=teacher, layers=3, with_attention=True
    )  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = TeacherTokens._encoded(own, TeacherTokens._row(own, images))
    with torch.no_grad():
        (seen,) = teacher.vit(teacher.normalise(images), last=3, with_attention=True)
    assert found.blocks_LBND.equal(seen.blocks_LBND) and found.attention_BN.equal(seen.attention_BN)
