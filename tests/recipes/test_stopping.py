"""A run that is asked to stop, by whatever means and under any launcher: saved, left, and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import Family
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
        self.run, self.family = run, Family()
        before = len(self.rows())
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without
        self.process = subprocess.Popen(
            [*LAUNCHERS[launcher], RECIPE, *flags, "--out", str(run)],
            env={**self.family.environment, **ENVIRONMENT}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until = time.monotonic() + 120
        while len(self.rows()) < before + 2:
            if self.process.poll() is not None or time.monotonic() > until:
                self.family.kill()
                pytest.fail("it has not begun to train: " + self.process.communicate()[1][-3000:])
            time.sleep(0.01)

    def rows(self):
        log = self.run / "log.jsonl"
        return [line for line in log.read_text().splitlines() if '"loss"' in line] if log.exists() else []

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
            out, err = self.process.communicate(timeout=60)
            left = self.family.left_after(60)
            assert not left, f"{left} go on without their launcher"
            return self.process.returncode, out + err
        finally:
            self.family.kill()

    def stopped(self):
        code, said = self.end()
        assert (self.run / "stopped.json").exists(), said[-3000:]
        record = json.loads((self.run / "stopped.json").read_text())
        assert record["exit_code"] == 85 and code != 0
        last = json.loads(self.rows()[-1])
        assert (record["stage"], record["step"]) == (last["stage"], last["step"])
        newest = f"step-{record['step']:06d}"
        assert (self.run / "checkpoints" / record["stage"] / newest).is_dir()
        return code, said


def test_each_signal_stops_a_bare_process_with_a_code_of_its_own_and_the_next_start_goes_on(flags, tmp_path):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        start = Start("bare", flags, tmp_path / "run")
        start.process.send_signal(number)
        code, said = start.stopped()
        assert code == 85 and "stopped when asked, saved; the same command continues." in said
        assert ("continuing from" in said) == (number != signal.SIGTERM)
    rows = [(row["stage"], row["step"]) for row in map(json.loads, start.rows())]
    assert len(rows) == len(set(rows)), "a step was taken twice"


SELDOM = pytest.mark.slow


@pytest.mark.parametrize("launcher", ["accelerate cpu", "accelerate cpu2", "torchrun"])
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGUSR1,
        pytest.param(signal.SIGINT, marks=SELDOM),
        pytest.param(signal.SIGUSR2, marks=SELDOM),
    ],
)
def test_a_signal_to_the_launcher_stops_the_run(flags, tmp_path, launcher, number):
    start = Start(launcher, flags, tmp_path / "run")
    start.process.send_signal(number)
    start.stopped()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_stops_the_run(flags, tmp_path, launcher):
    start = Start(launcher, flags, tmp_path / "run")
    start.ctrl_c()
    start.stopped()


@pytest.mark.parametrize("launcher", ["accelerate cpu2", "torchrun"])
def test_a_second_ctrl_c_leaves_at_once_though_a_rank_hangs(flags, tmp_path, launcher):
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


@pytest.mark.parametrize("launcher", ["accelerate cpu2", "torchrun"])
def test_a_signal_to_one_rank_alone_stops_all(flags, tmp_path, launcher):
    start = Start(launcher, flags, tmp_path / "run")
    ranks = start.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    start.stopped()


@pytest.mark.parametrize("launcher", ["bare", "torchrun"])
def test_a_run_that_is_asked_to_stop_while_it_judges_does_and_judges_again(small, tmp_path, launcher):
    run, line = tmp_path / "run", [*LAUNCHERS[launcher], RECIPE, *small, "--no-tune", "--score-batch", "2"]
    process = subprocess.Popen([*line, "--out", str(run)], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not (run / "student.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.001)
    (run / "stop").touch()
    assert process.wait(60) != 0 and not (run / "results.json").exists() and not (run / "stop").exists()
    assert json.loads((run / "stopped.json").read_text())["exit_code"] == 85
    done = subprocess.run([*line, "--out", str(run)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "AUROC" in done.stdout, done.stderr
    assert not (run / "stopped.json").exists()


def test_what_a_start_left_when_it_stopped_is_gone_when_the_next_fails_early(flags, tmp_path):
    start = Start("bare", flags, tmp_path / "run")
    start.process.send_signal(signal.SIGTERM)
    start.stopped()
    line = [*LAUNCHERS["bare"], RECIPE, *flags, "--out", str(tmp_path / "run"), "--hang-timeout-min", "0.02"]
    line[line.index("--train-limit") + 1] = "49"  # other settings: refused, and nothing is touched
    assert subprocess.run(line, env=ENVIRONMENT, capture_output=True).returncode == 2
    assert (tmp_path / "run" / "stopped.json").exists()
    line[line.index("--train-limit") + 1] = "48"
    line += ["--trackers", "trackio"]  # which is not installed
    failed = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    assert failed.returncode == 2 and "trackio" in failed.stderr
    assert not (tmp_path / "run" / "stopped.json").exists()
