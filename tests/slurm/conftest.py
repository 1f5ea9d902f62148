"""A SLURM cluster, whatever `sinfo` shows, and what a user types. Without one the tests marked `slurm` are skipped."""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.recipes.conftest import ENVIRONMENT, ROOT, shards, small, teacher  # noqa: F401

RECIPE = str(ROOT / "recipes" / "defend.py")
BIN = Path(sys.executable).parent


def pytest_collection_modifyitems(items):
    if answer := no_cluster():
        for item in items:
            if item.get_closest_marker("slurm"):
                item.add_marker(pytest.mark.skip(reason=answer))


def no_cluster():
    try:
        found = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "needs a SLURM cluster: no `sinfo` here"
    return "" if found.stdout.strip() else "needs a SLURM cluster: `sinfo` shows no partition"


def slurm(*words, cwd=None, fails=None, timeout_s=600, **environment):
    """What a user types: bigtrain-slurm and so on; its output, both streams together."""
    command = [BIN / "bigtrain-slurm", *map(str, words)]
    around = {**ENVIRONMENT, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=around, cwd=cwd, timeout=timeout_s)
    assert (done.returncode == fails) if fails else (done.returncode == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def ask(command):
    return subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout.strip()


def submitted(said):
    """The id in what submit or sweep says."""
    return said.split("job ", 1)[1].split(":")[0]


def events(run):
    file = run / "events.jsonl"
    return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []


def told(run):
    return [row["event"] for row in events(run)]


def steps(run):
    """How far the log is: the number of rows with a loss."""
    file = run / "log.jsonl"
    return sum('"loss"' in row for row in file.read_text().splitlines()) if file.exists() else 0


def until(condition, what, wait_s=120):
    end = time.monotonic() + wait_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {wait_s} s for {what}\n{ask('squeue')}"
        time.sleep(0.1)
    return found


def nodes_of(job):
    return ask(f"scontrol show hostnames {ask(f'squeue -h -j {job} -o %N')}").split()


def until_life(run, number):
    until(lambda: told(run).count("started") >= number, f"life {number} of {run}: {told(run)}")


def until_training(run):
    """A new life has trained some steps more."""
    lives, before = told(run).count("started"), steps(run)
    until(lambda: steps(run) > before + 5, f"training in life {lives} of {run}: {told(run)}")


def until_done(*runs, wait_s=240):
    def ended():
        for run in runs:
            assert "failed" not in told(run), [row for row in events(run) if row["event"] == "failed"]
        return all((run / "results.json").exists() and told(run)[-1] == "finished" for run in runs)

    until(ended, f"the end of {[str(run) for run in runs]}", wait_s)


def same_bits(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in BITS)


BITS = ("teacher.safetensors", "student.safetensors", "scores.parquet")


@pytest.fixture
def cluster(tmp_path_factory):
    """One test at a time, in whatever process. Its jobs, whose ids this gives, do not stay; no others are touched."""
    folder = f"{tmp_path_factory.getbasetemp()}/"

    def queued():
        rows = (row.split("|", 1) for row in ask("squeue -h --me -o %A|%o").splitlines())
        return [job for job, batch_script in rows if batch_script.startswith(folder)]

    with Path(tempfile.gettempdir(), f"bigtrain-slurm-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield queued
        if left := queued():
            subprocess.run(["scancel", "--full", *left], capture_output=True)
        until(lambda: not queued(), "the end of this test's jobs", 60)


@pytest.fixture(scope="session")
def long_run(small):  # noqa: F811
    """A run of some 20 s behind its start, that is saved now and then."""
    return [*small, "--distil-epochs", "150", "--checkpoint-every", "20", "--log-every", "1"]


@pytest.fixture(scope="session")
def undisturbed(long_run, tmp_path_factory):
    """The same run on this machine, without SLURM, by the number of processes."""
    found = {}

    def run(processes):
        if processes not in found:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            slurm("submit", RECIPE, "--local", "--tasks-per-node", processes, "--", *long_run, "--out", out)
            found[processes] = out
        return found[processes]

    return run


@pytest.fixture
def power():
    """Switches a node off, and all on again; only of a throw-away cluster."""
    folder, down, up = os.environ.get("BIGTRAIN_TEST_SLURM"), shutil.which("slurm-down"), shutil.which("slurm-up")
    if not (folder and down and up):
        pytest.skip("needs a throw-away cluster: BIGTRAIN_TEST_SLURM and slurm-up, slurm-down")
    off = []

    class Power:
        def off(self, node):
            subprocess.run([down, folder, "--kill-node", node], check=True, capture_output=True)
            off.append(node)

        def all_on(self):
            while off:
                subprocess.run([up, folder, "--start-node", off.pop()], check=True, capture_output=True)

    yield Power()
    Power().all_on()
