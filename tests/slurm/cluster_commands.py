"""What a user types, and what runs and a SLURM cluster then say."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from slurm import slurm_cli
from tests.launching import ENVIRONMENT, ROOT

RECIPE = str(ROOT / "recipes" / "defend.py")
COUNTING = str(Path(__file__).with_name("recipe_without_torch.py"))
BIN = Path(sys.executable).parent
BITS = ("teacher.safetensors", "student.safetensors", "scores.parquet")


def slurm(*words, cwd=None, fails=0, **environment):
    """bigtrain-slurm in this process: what it says, both streams together; `fails` is the exit code it has."""
    said = io.TextIOWrapper(io.BytesIO(), write_through=True)
    around = mock.patch.dict(os.environ, {**ENVIRONMENT, **environment}, clear=True)
    out, err = contextlib.redirect_stdout(said), contextlib.redirect_stderr(said)
    with around, contextlib.chdir(cwd or Path.cwd()), out, err:
        try:
            code = slurm_cli.main(list(map(str, words)))
        except SystemExit as leaving:  # of argparse
            code = leaving.code
    text = said.buffer.getvalue().decode()
    assert code == fails, f"bigtrain-slurm {shlex.join(map(str, words))} has ended with {code}:\n{text}"
    return text


def ask(command):
    return subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout.strip()


def submitted(said):
    """The id in what submit, sweep or retry says."""
    return said.split("job ", 1)[1].split(":")[0]


def events(run):
    file = run / "events.jsonl"
    return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []


def told(run):
    return [row["event"] for row in events(run)]


def whys(run):
    """Why attempts that were to be followed by another ended."""
    return [row["why"] for row in events(run) if row["event"] in ("requeued", "lost")]


def steps(run):
    """How far the log is: the number of rows with a loss."""
    file = run / "log.jsonl"
    return sum('"loss"' in row for row in file.read_text().splitlines()) if file.exists() else 0


def same_bits(one, other, names=BITS):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def status(run):
    """How one run stands, its job, and what else status says of it."""
    return slurm("status", run).strip().removeprefix(str(run)).split(None, 2)


def in_attempt(run, number, more_steps=3):
    """Returns a condition: this many attempts have started, and each has done all its steps."""
    return lambda: told(run).count("started") == number and steps(run) == number * more_steps


def until(condition, what, wait_s=120, state=lambda: ask("squeue")):
    end = time.monotonic() + wait_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {wait_s} s for {what}\n{state()}"
        time.sleep(0.1)
    return found


def nodes_of(job):
    return ask(f"scontrol show hostnames {ask(f'squeue -h -j {job} -o %N')}").split()


def until_attempt(run, number):
    until(lambda: told(run).count("started") >= number, f"attempt {number} of {run}: {told(run)}")


def until_training(run, more=5):
    """The newest attempt has trained some more steps."""
    number, before = told(run).count("started"), steps(run)
    until(lambda: steps(run) > before + more, f"training in attempt {number} of {run}: {told(run)}")


def until_done(*runs, wait_s=240):
    def ended():
        for run in runs:
            assert "failed" not in told(run), [row for row in events(run) if row["event"] == "failed"]
        return all((run / "results.json").exists() and told(run)[-1] == "finished" for run in runs)

    until(ended, f"the end of {[str(run) for run in runs]}", wait_s)
