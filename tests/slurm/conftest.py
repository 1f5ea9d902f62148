"""Clusters: stand-ins for one, and the real one that `sinfo` shows; without it the tests marked `slurm` are skipped."""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.launching import run as run_forked
from tests.made_once import made_once
from tests.slurm.cluster_commands import COUNTING, ask, slurm, submitted, until
from tests.slurm.fake_scheduler import Scheduler


def pytest_collection_modifyitems(items):
    needing = [item for item in items if item.get_closest_marker("slurm")]
    if needing and (answer := no_cluster()):
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=answer))


def no_cluster():
    try:
        found = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "needs a SLURM cluster: no `sinfo` here"
    return "" if found.stdout.strip() else "needs a SLURM cluster: `sinfo` shows no partition"


@pytest.fixture
def scheduler(monkeypatch):
    """Stand-ins for SLURM's commands; jobs run in this process. Fails if a planned event has not happened."""
    made = Scheduler(monkeypatch)
    logging.disable(logging.INFO)  # submitit's own messages, which appear or not depending on import order
    yield made
    logging.disable(logging.NOTSET)
    assert not made.plans, "an event planned for an attempt did not happen"


@pytest.fixture
def run(tmp_path):
    return tmp_path / 'it\'s "a" run'


@pytest.fixture
def submit(run, scheduler):
    """Submit the recipe without torch, with these options of the job and flags of its own."""

    def job(*flags, options=()):
        return submitted(slurm("submit", COUNTING, *options, "--", *flags, "--out", run))

    return job


@pytest.fixture(scope="session")
def counted(tmp_path_factory):
    """The output of an uninterrupted run of the recipe without torch."""

    def make(folder):
        subprocess.run([sys.executable, COUNTING, "--out", folder], check=True, capture_output=True)

    return made_once(tmp_path_factory, "counted", make)


@pytest.fixture
def cluster(tmp_path_factory):
    """For one test at a time, across workers: lists its jobs' ids, and cancels those, no others, at the end."""
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
def long_run(small):
    """A run of some 10 s behind its start, time enough for four attempts, that is saved now and then."""
    return [*small, "--distil-epochs", "75", "--checkpoint-every", "20", "--log-every", "1"]


@pytest.fixture(scope="session")
def undisturbed(long_run, tmp_path_factory):
    """The same run on this machine, without SLURM, by the number of processes."""

    def of(processes):
        def make(folder):
            done = run_forked("defend.py", *long_run, "--out", folder / "run", processes=processes)
            assert done.returncode == 0, done.stderr

        return made_once(tmp_path_factory, f"undisturbed_{processes}", make) / "run"

    return of


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
