"""A run that is asked to stop, by whatever means and under any launcher: saved, left, and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import running_in_session
from tests.recipes.conftest import ENVIRONMENT, ROOT

RECIPE = str(ROOT / "recipes" / "defend.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]
LAUNCHERS = {
    "bare": [sys.executable],
    "accelerate cpu": [*ACCELERATE, str(ROOT / "recipes/accelerate/cpu.yaml")],
    "accelerate cpu2": [*ACCELERATE, str(ROOT / "recipes/accelerate/cpu2.yaml")],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.fixture(scope="module")
def flags(small):
    """A run that never ends of itself within a test."""
    return [*small, "--distil-epochs", "100000", "--checkpoint-every", "100000"]


class Start:
    """One start of a run, in a session of its own, as a shell gives its jobs one."""

    def __init__(self, launcher, flags, run):
        self.run = run
        self.before = self.rows()
        self.process = subprocess.Popen(
            [*LAUNCHERS[launcher], RECIPE, *flags, "--out", str(run)],
            env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until = time.monotonic() + 120
        while len(self.rows()) < len(self.before) + 2:
            assert self.process.poll() is None, self.process.communicate()[1][-3000:]
            assert time.monotonic() < until, "it has not begun to train"
            time.sleep(0.01)

    def rows(self):
        log = self.run / "log.jsonl"
        return [line for line in log.read_text().splitlines() if "loss" in line] if log.exists() else []

    def ranks(self):
        """The processes that train."""
        own = [
            int(pid) for pid in running_in_session(self.process.pid)
            if RECIPE in (line := open(f"/proc/{pid}/cmdline").read().split("\0"))
            and not any("accelerate" in part or "torch.distributed" in part for part in line)
        ]  # fmt: skip
        return sorted(own)

    def end(self):
        """Exit code, output, and no process of it left."""
        try:
            out, err = self.process.communicate(timeout=60)
            until = time.monotonic() + 60
            while (left := running_in_session(self.process.pid)) and time.monotonic() < until:
                time.sleep(0.05)
            assert not left, f"{left} go on without their launcher"
            return self.process.returncode, out + err
        finally:
            if running_in_session(self.process.pid):
                os.killpg(self.process.pid, signal.SIGKILL)

    def stopped(self):
        code, said = self.end()
        assert (self.run / "stopped.json").exists(), said[-3000:]
        record = json.loads((self.run / "stopped.json").read_text())
        assert record["exit_code"] == 85 and code != 0
        last = json.loads(self.rows()[-1])
        assert (record["stage"], record["step"]) == (last["stage"], last["step"])
        newest = f"step-{record['step']:06d}"
        assert (self.run / "checkpoints" / record["stage"] / newest).is_dir()
        return code, record["step"], said


def test_each_signal_stops_a_bare_process_with_a_code_of_its_own_and_the_next_start_goes_on(flags, tmp_path):
    steps = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        start = Start("bare", flags, tmp_path / "run")
        start.process.send_signal(number)
        code, step, said = start.stopped()
        assert code == 85 and "stopped when asked, saved; the same command continues." in said
        assert ("continuing from" in said) == bool(steps)
        steps.append(step)
    assert steps == sorted(set(steps))


def test_a_second_ctrl_c_leaves_at_once(flags, tmp_path):
    start = Start("bare", flags, tmp_path / "run")
    start.process.send_signal(signal.SIGSTOP)  # so that both come within one step
    start.process.send_signal(signal.SIGINT)
    start.process.send_signal(signal.SIGCONT)
    time.sleep(2)
    start.process.send_signal(signal.SIGINT)
    code, said = start.end()
    assert code in (85, 130)


@pytest.mark.parametrize("launcher", ["accelerate cpu", "accelerate cpu2", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_launcher_stops_the_run(flags, tmp_path, launcher, number):
    start = Start(launcher, flags, tmp_path / "run")
    start.process.send_signal(number)
    start.stopped()


@pytest.mark.parametrize("launcher", ["bare", "accelerate cpu", "accelerate cpu2", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_at_once_stops_the_run(flags, tmp_path, launcher, number):
    start = Start(launcher, flags, tmp_path / "run")
    os.killpg(start.process.pid, number)
    start.stopped()


@pytest.mark.parametrize("launcher", ["accelerate cpu2", "torchrun"])
def test_a_signal_to_one_rank_alone_stops_all(flags, tmp_path, launcher):
    start = Start(launcher, flags, tmp_path / "run")
    ranks = start.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    start.stopped()
