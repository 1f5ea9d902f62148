"""A run of two processes that is killed again and again ends with the bits of an undisturbed one."""

import contextlib
import json
import os
import random
import signal
import time

import pytest

from tests.launching import start
from tests.processes import in_session, left_in_session

LIMIT_S = 300  # for one start


def started(flags, run, workers=0):
    return start("defend.py", *flags, "--workers", workers, "--out", run, processes=2, own_session=True)


MOMENTS = {  # what to wait for in each start, before a further random delay
    "training": lambda run, rows: (run / "log.jsonl").exists() and len((run / "log.jsonl").read_bytes()) > rows,
    "saving": lambda run, rows: any(run.glob("checkpoints/*/step-*.tmp")),
    "changing stage": lambda run, rows: (run / "teacher.safetensors").exists(),
    "evaluating": lambda run, rows: (run / "student.safetensors").exists(),
}


def checkpoints(run):
    """The step of the newest complete checkpoint of each stage."""
    found = {}
    for path in run.glob("checkpoints/*/step-*"):
        if path.suffix != ".tmp":
            step = int(path.name.removeprefix("step-"))
            found[path.parent.name] = max(found.get(path.parent.name, 0), step)
    return found


def is_kept(before, run):
    now = checkpoints(run)
    leaves = {"tune": "teacher.safetensors", "distil": "student.safetensors"}
    return all(now.get(stage, -1) >= step or (run / leaves[stage]).exists() for stage, step in before.items())


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills(small, tmp_path, kills):
    """A run killed at any moment loses no checkpoint, ends with the same bits and leaves nothing behind."""
    flags = [*small, "--train-limit", "48", "--distil-epochs", "3"]
    whole, run = tmp_path / "whole", tmp_path / "killed"
    assert started(flags, whole).result().returncode == 0
    chance = random.Random(kills)
    killed = []
    moments = ["saving", "training", "changing stage", "evaluating"]
    for number in range(kills):
        # in the order of the run, since a phase that is over does not come again
        moment = moments[number * len(moments) // kills]
        rows = (run / "log.jsonl").stat().st_size if (run / "log.jsonl").exists() else 0
        process = started(flags, run, workers=number % 2)
        until = time.monotonic() + LIMIT_S
        while process.poll() is None and not MOMENTS[moment](run, rows) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(chance.random() * (0.02 if moment == "saving" else 0.3))
        before = checkpoints(run)
        if process.poll() is None:
            killed.append(moment)
        for rank in process.ranks:
            for pid in in_session(rank.pid):  # those that read for it too
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.result()
        assert is_kept(before, run), "a checkpoint was lost"
    assert len(killed) >= kills - 1 and "training" in killed and "saving" in killed
    last = started(flags, run, workers=1)
    assert last.result().returncode == 0
    for name in ("teacher.safetensors", "student.safetensors", "scores.parquet"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((run / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
    assert not list(run.rglob("*.tmp")) and not (run / "checkpoints").exists()
    assert not any(left_in_session(rank.pid, 20) for rank in last.ranks)
