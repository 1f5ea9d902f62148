"""The teacher's tokens, computed once or in each step."""

import shutil
from collections import Counter

import pytest
import torch

from bigtrain.models.weights import read_tensors
from recipes.defend import main
from recipes.teacher_tokens import TeacherTokens
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
    one, two = (read_tensors(run / "student.safetensors")[0] for run in (finished, tuned))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    assert results(tuned)["auroc"] == pytest.approx(results(finished)["auroc"], abs=2e-3)
    assert not (finished / "teacher_tokens").exists() and not (tuned / "teacher_tokens").exists()


def test_computed_once(small, tuned, monkeypatch):
    """The teacher sees the training pictures once, whatever the number of epochs."""
    calls = Counter()
    for name in ("_row", "_encoded"):
        monkeypatch.setattr(TeacherTokens, name, counted(calls, name))
    main([*small, "--out", str(tuned)])
    assert calls == {"_row": 1, "_encoded": 8}  # its eight steps are two epochs


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
