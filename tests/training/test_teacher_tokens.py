"""The teacher's tokens, computed once: for all epochs, and for all figures of a batch."""

import errno
import os
import shutil
import threading
from collections import Counter

import pytest
import torch

import bigtrain
from bigtrain.data.decode import Picture
from bigtrain.methods.defend.compared import CachedTeacherDetector
from bigtrain.models.architecture import Architecture
from bigtrain.models.read_weights import read_tensors
from bigtrain.models.vit import Encoded, ViT
from bigtrain.training.teacher_tokens import TeacherTokens
from bigtrain.training.token_rows import TokenRows
from recipes.defend import main
from tests.runs import ask_to_stop, results


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


def test_same_student(finished, small, tuned):
    """With and without caches the student is the same, bit for bit, and nothing of them stays."""
    main([*small, "--out", str(tuned), "--cache-gib", "0"])
    check_alike(finished, tuned, exactly=True)
    assert results(tuned)["auroc"] == results(finished)["auroc"]
    assert not (finished / "cache").exists() and not (tuned / "cache").exists()


def check_alike(finished, tuned, *, exactly=False):
    one, two = (read_tensors(run / "student.safetensors")[0] for run in (finished, tuned))
    for name, weight in one.items():
        how = {"atol": 0, "rtol": 0} if exactly else {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(two[name], weight, msg=name, **how)


def test_computed_once(finished, small, tmp_path, monkeypatch):
    """The teacher sees the training pictures once, in the first epoch, whatever the number of epochs."""
    calls = Counter()
    monkeypatch.setattr(TeacherTokens, "_computed", counted(TeacherTokens._computed, calls, "teacher"))
    monkeypatch.setattr(Picture, "cut", counted(Picture.cut, calls, "decoded"))
    folder = tmp_path / "shared"
    main([*small, "--no-tune", "--out", str(tmp_path / "run"), "--cache-dir", str(folder)])
    assert calls["teacher"] == 4 and list(folder.glob("tokens-*.rows"))  # 24 pictures in batches of 6, two epochs
    before = calls["decoded"]
    main([*small, "--no-tune", "--seed", "1", "--out", str(tmp_path / "again"), "--cache-dir", str(folder)])
    assert calls["teacher"] <= 8 and calls["decoded"] - before < before / 2  # another seed, most of the same pictures


def test_within_one_epoch(small, tmp_path, monkeypatch):
    """Where no picture comes twice nothing is kept."""
    monkeypatch.setattr(TeacherTokens, "_keep", None)
    main([*small, "--distil-epochs", "1", "--out", str(tmp_path / "run")])


def test_disk_full_on_the_way(finished, small, tuned, monkeypatch, capsys):
    """On a full disk training goes on without the caches, and the run says so."""

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    main([*small, "--out", str(tuned)])
    assert "there is no room left for the cached tokens" in capsys.readouterr().out
    check_alike(finished, tuned, exactly=True)


def counted(function, calls, name):
    def call(*given):
        calls[name] += 1
        return function(*given)

    return call


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--cache-gib", "1e-6"], "more than --cache-gib 1e-06 leaves: they are made in each epoch"),
        (["--cache-dir", "/dev/null/none"], "cannot be kept in /dev/null/none"),
    ],
)
def test_no_room(finished, small, tuned, capsys, flags, says):
    """Caches that find no room are left out, and the run says so."""
    main([*small, "--out", str(tuned), *flags])
    said = capsys.readouterr().out
    assert "note: the views of 24 images " in said and said.count(says) > 1  # of both caches
    check_alike(finished, tuned, exactly=True)


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


@pytest.mark.parametrize(("kept", "within"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 1 / 127)])
@pytest.mark.parametrize("with_attention", [True, False])
def test_rows_of_tokens(kept, within, with_attention):
    """Tokens of several blocks come back from their rows, rounded as stated; attention always as it was."""
    architecture = Architecture("vit_tiny_patch16_224", 32, 8, 4)
    vit = ViT(architecture.build()).eval()
    with torch.no_grad():
        (seen,) = vit(torch.randn(2, 3, 32, 32), last=3, with_attention=with_attention)
    rows = TokenRows(kept, 3, 16, vit.width, with_attention)
    row_B = rows.pack(seen)
    assert row_B.shape == (2, rows.row_bytes) and row_B.dtype == torch.uint8
    found = rows.unpack(row_B)
    largest = seen.blocks_LBND.abs().amax(dim=-1, keepdim=True)
    assert ((found.blocks_LBND - seen.blocks_LBND).abs() <= within * largest).all()
    assert found.attention_BN is None if not with_attention else found.attention_BN.equal(seen.attention_BN)
    assert rows.pack(found).equal(row_B) or kept == "int8"


def test_tokens_of_zero():
    """Tokens that are all zero stay so in int8."""
    rows = TokenRows("int8", 1, 4, 8, with_attention=False)
    zero = rows.unpack(rows.pack(Encoded(torch.zeros(1, 2, 4, 8), None, None)))
    assert not zero.blocks_LBND.any()


@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_rounded_alike(small, tmp_path, kept):
    """Rounded tokens give the same student whether or not there is room to keep them."""
    flags = [*small, "--no-tune", "--precision", "bf16", "--cache-dtype", kept]
    for name, room in (("kept", "16"), ("not", "1e-9")):
        main([*flags, "--cache-gib", room, "--out", str(tmp_path / name)])
    check_alike(tmp_path / "kept", tmp_path / "not", exactly=True)


def test_tokens_of_tuned_teacher(small, tmp_path):
    """In a shared folder the tokens of a teacher that the run has tuned go with it; the views stay."""
    folder = tmp_path / "shared"
    main([*small, "--cache-dir", str(folder), "--out", str(tmp_path / "run")])
    assert not list(folder.glob("tokens-*")) and len(list(folder.glob("views-*.rows"))) == 2  # of both sets


def test_killed_in_first_epoch(finished, small, tmp_path):
    """A run that is stopped while its caches fill goes on to the same bits."""
    run = tmp_path / "run"
    threading.Thread(target=ask_to_stop, args=(run, 5), daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        main([*small, "--out", str(run)])
    assert stop.value.code == 85 and list((run / "cache").glob("tokens-*.rows"))
    main([*small, "--out", str(run)])
    check_alike(finished, run, exactly=True)
