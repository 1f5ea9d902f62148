"""A run that is asked to stop, by any means and under any launcher: it saves, exits, and can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.runtime.exit_codes import STOPPED
from tests import launching
from tests.launching import ENVIRONMENT, ROOT
from tests.processes import Family, left_in_session
from tests.runs import losses, rows

RECIPE = str(ROOT / "recipes" / "defend.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]
LAUNCHERS = {
    "accelerate cpu": [*ACCELERATE, str(ROOT / "recipes/accelerate/cpu.yaml")],
    "accelerate cpu2": [*ACCELERATE, str(ROOT / "recipes/accelerate/cpu2.yaml")],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.fixture(scope="module")
def flags(small):
    """Flags of a run whose first stage is too long to finish within a test: between stages it would stop at no step."""
    return [*small, "--tune-epochs", "100000", "--checkpoint-every", "100000"]


class Start:
    """One start of a run by a launcher, in a session of its own, as a shell gives its jobs one."""

    def __init__(self, launcher, flags, run):
        self.run, self.family = run, Family()
        before = len(losses(run))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without
        self.process = subprocess.Popen(
            [*LAUNCHERS[launcher], RECIPE, *flags, "--out", str(run)],
            env={**self.family.environment, **ENVIRONMENT}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if not until_trained(run, before, self.process):
            self.family.kill()
            pytest.fail("it has not begun to train: " + self.process.communicate()[1][-3000:])

    def ranks(self):
        """The processes that train, not what launched them."""
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in self.family.alive()}
        return [pid for pid, line in commands.items() if line.index(RECIPE) <= 2]

    def ctrl_c(self):
        """What a terminal does: all processes in front of it get the signal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self):
        """Exit code, output, and no process of it left."""
        try:
            out, err = self.process.communicate(timeout=120)
            left = self.family.left_after(120)
            assert not left, f"{left} go on without their launcher"
            return self.process.returncode, out + err
        finally:
            self.family.kill()

    def stopped(self):
        code, said = self.end()
        assert code != 0
        has_stopped(self.run, said)


def until_trained(run, steps, process):
    """Wait until two steps more are in the log; False if the process ends before."""
    until = time.monotonic() + 200
    while len(losses(run)) < steps + 2:
        if process.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def has_stopped(run, said):
    """The run says where it has stopped, which is its last step, and has saved there."""
    assert (run / "stopped.json").exists(), said[-3000:]
    record = json.loads((run / "stopped.json").read_text())
    assert record["exit_code"] == STOPPED
    last = [row for row in rows(run) if "loss" in row][-1]
    assert (record["stage"], record["step"]) == (last["stage"], last["step"])
    assert (run / "checkpoints" / record["stage"] / f"step-{record['step']:06d}").is_dir()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, "ctrl-c"])
def test_a_bare_process(flags, tmp_path, by):
    """Each signal stops it with a code of its own and no process of it is left; the next start goes on."""
    run = tmp_path / "run"
    for number in range(2 if by == signal.SIGUSR1 else 1):
        process = launching.start("defend.py", *flags, "--workers", 1, "--out", run, own_session=True).ranks[0]
        assert until_trained(run, len(losses(run)), process), process.said("err")
        if by == "ctrl-c":  # a terminal's, to all processes in front of it
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(by)
        assert process.wait() == STOPPED
        assert not left_in_session(process.pid, 60)
        has_stopped(run, process.said("err"))
        assert "stopped on request, saved; the same command continues." in process.said("out")
        assert ("continuing from" in process.said("out")) == (number > 0)
    steps = [(row["stage"], row["step"]) for row in rows(run) if "loss" in row]
    assert len(steps) == len(set(steps)), "a step was taken twice"


SELDOM = pytest.mark.slow


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("accelerate cpu", signal.SIGTERM),
        ("accelerate cpu2", signal.SIGUSR1),
        ("torchrun", signal.SIGTERM),
        pytest.param("torchrun", signal.SIGUSR1, marks=SELDOM),
        pytest.param("accelerate cpu", signal.SIGUSR1, marks=SELDOM),
        pytest.param("accelerate cpu2", signal.SIGTERM, marks=SELDOM),
        *(pytest.param(name, number, marks=SELDOM) for name in LAUNCHERS for number in (signal.SIGINT, signal.SIGUSR2)),
    ],
)
def test_signal_to_launcher(flags, tmp_path, launcher, number):
    """A signal to the launcher stops the run, saved and with no process left."""
    start = Start(launcher, flags, tmp_path / "run")
    start.process.send_signal(number)
    start.stopped()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_stops_the_run(flags, tmp_path, launcher):
    start = Start(launcher, flags, tmp_path / "run")
    start.ctrl_c()
    start.stopped()


@pytest.mark.parametrize("launcher", [pytest.param("accelerate cpu2", marks=SELDOM), "torchrun"])
def test_second_ctrl_c(flags, tmp_path, launcher):
    """A second Ctrl-C ends the run at once, though a rank hangs."""
    start = Start(launcher, flags, tmp_path / "run")
    waiting, frozen = start.ranks()
    os.kill(frozen, signal.SIGSTOP)  # the other waits for it in a collective
    start.ctrl_c()
    time.sleep(2)
    assert waiting in start.family.alive()
    start.ctrl_c()
    until = time.monotonic() + 10
    while waiting in start.family.alive() and time.monotonic() < until:
        time.sleep(0.05)
    waits_on = waiting in start.family.alive()
    os.kill(frozen, signal.SIGCONT)
    code, said = start.end()
    assert not waits_on and code != 0 and "interrupted; the same command continues." in said
    assert not (tmp_path / "run" / "stopped.json").exists()


@pytest.mark.parametrize("launcher", ["accelerate cpu2", pytest.param("torchrun", marks=SELDOM)])
def test_signal_to_one_rank(flags, tmp_path, launcher):
    """A signal to one rank alone stops them all."""
    start = Start(launcher, flags, tmp_path / "run")
    ranks = start.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    start.stopped()


@pytest.mark.parametrize("processes", [1, 2])
def test_asked_to_stop_while_it_judges(small, tmp_path, processes):
    """It does, and judges again at the next start."""
    run, flags = tmp_path / "run", [*small, "--no-tune", "--score-batch", "2"]
    start = launching.start("defend.py", *flags, "--out", run, processes=processes)
    while not (run / "student.safetensors").exists():
        assert start.poll() is None
        time.sleep(0.001)
    (run / "stop").touch()
    assert start.result().returncode == STOPPED
    assert not (run / "results.json").exists() and not (run / "stop").exists()
    assert json.loads((run / "stopped.json").read_text())["exit_code"] == STOPPED
    done = launching.run("defend.py", *flags, "--out", run, processes=processes)
    assert done.returncode == 0 and "AUROC" in done.stdout, done.stderr
    assert not (run / "stopped.json").exists()


def test_stale_stopped_json(flags, tmp_path):
    """The `stopped.json` that a start has left is gone when the next one fails early."""
    run = tmp_path / "run"
    start = launching.start("defend.py", *flags, "--out", run)
    assert until_trained(run, 0, start)
    start.send_signal(signal.SIGTERM)
    has_stopped(run, start.result().stderr)
    other = [*flags, "--out", run, "--hang-timeout-min", "0.02"]
    other[other.index("--train-limit") + 1] = "25"  # other settings: refused, and nothing is touched
    assert launching.run("defend.py", *other).returncode == 2
    assert (run / "stopped.json").exists()
    other[other.index("--train-limit") + 1] = "24"
    failed = launching.run("defend.py", *other, "--trackers", "trackio")  # which is not installed
    assert failed.returncode == 2 and "trackio" in failed.stderr
    assert not (run / "stopped.json").exists()
