"""The same jobs without SLURM, and what is shown before anything is submitted."""

import json
import os
import signal
import subprocess
import time

import pytest

from bigtrain.cli import main as bigtrain
from tests.launching import ENVIRONMENT, run
from tests.processes import VARIABLE, Family
from tests.slurm.cluster_commands import BIN, RECIPE, events, same_bits, slurm, steps, told

pytestmark = pytest.mark.timeout(400)  # each process of these jobs imports torch for itself


@pytest.fixture
def family():
    """Marks the processes of local jobs, so that none outlives a test that fails."""
    made = Family()
    yield {VARIABLE: made.name}
    made.kill()


def test_ctrl_c(small, tmp_path, family):
    """A local job of two processes is stopped by Ctrl-C; `retry` goes on here, to the bits of an undisturbed run."""
    whole, stopped = tmp_path / "whole", tmp_path / 'it\'s "a" run'
    line = ["submit", RECIPE, "--local", "--tasks-per-node", "2", "--", *small, "--out", str(stopped)]
    restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    started = {"env": {**ENVIRONMENT, **family}, "start_new_session": True, "stdout": subprocess.DEVNULL, **restored}
    with subprocess.Popen([BIN / "bigtrain-slurm", *line], **started) as job:
        while steps(stopped) < 2:
            assert job.poll() is None
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(timeout=300) == 1
    assert told(stopped) == ["submitted", "started", "stopped"] and 0 < steps(stopped) < 4 + 8
    assert "stopped" in slurm("status", stopped)
    assert ": finished" in slurm("retry", stopped, **family)
    assert told(stopped)[3:] == ["submitted", "started", "finished"]
    assert [row["processes"] for row in events(stopped) if row["event"] == "started"] == [2, 2]
    done = run("defend.py", *small, "--out", whole, processes=2)
    assert done.returncode == 0, done.stderr
    assert "done" in slurm("status", stopped) and same_bits(stopped, whole) and steps(stopped) == steps(whole)
    assert "is finished, nothing to do" in slurm(*line)


def test_sweep(small, tmp_path, capsys, family):
    """A local sweep with a shared teacher ends in a table."""
    settings = dict(zip((flag[2:].replace("-", "_") for flag in small[::2]), small[1::2], strict=True))
    del settings["known"]
    text = "\n".join(f"{n} = {json.dumps(v) if n in ('train', 'test', 'teacher') else v}" for n, v in settings.items())
    file, out = tmp_path / "one.toml", tmp_path / "out"
    file.write_text(
        f"""
recipe = {json.dumps(RECIPE)}
out = {json.dumps(str(out))}
[settings]
tune = false
{text}
[axes]
known = [["bag"]]
[[shared]]
name = "teacher"
per = ["known"]
settings = {{ tune = true, distil = false }}
leaves = {{ teacher = "teacher.safetensors" }}
"""
    )
    before = slurm("sweep", file, "--dry-run")
    assert "bag          known bag  after teacher-bag" in before
    assert "2 runs in " in before and "#SBATCH --array=0-1" in before and not out.exists()
    assert slurm("sweep", file, "--local", **family).count(": finished") == 2
    one, tuned = out / "bag", out / "teacher-bag"
    resolved = json.loads((one / "config.json").read_text())["settings"]
    assert resolved["teacher"] == str(tuned / "teacher.safetensors") and resolved["known"] == ["bag"]
    assert not (tuned / "student.safetensors").exists() and (one / "student.safetensors").exists()
    assert "2 runs: 2 done" in slurm("status", out)
    assert bigtrain(["tables", str(out)]) == 0
    table = capsys.readouterr().out
    assert "| bag" in table and "missing" not in table
    assert "0 to run" in slurm("sweep", file, "--local")


def test_refusals(small, tmp_path):
    """Wrong flags end with a sentence and leave nothing."""
    out = tmp_path / "run"
    assert "there is no recipe" in slurm("submit", "nowhere.py", "--local", "--", "--out", out, fails=2)
    said = slurm("submit", RECIPE, "--local", "--", *small, "--mask-ratio", "2", "--out", out, fails=2)
    assert "defend.py: error: --mask-ratio is 2.0; it must be from 0 to 0.99." in said and "Traceback" not in said
    assert "sbatch expands '%' in names" in slurm(
        "submit", RECIPE, "--local", "--", *small, "--out", out / "%j", fails=2
    )
    assert "holds neither a sweep nor a submitted run" in slurm("status", tmp_path, fails=2)
    assert not out.exists()


def test_wrong_command():
    """The installed command ends with the exit code of a user's mistake, and says on stderr what it was."""
    line = [BIN / "bigtrain-slurm", "submit", "nowhere.py", "--local"]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("bigtrain-slurm: error: there is no recipe nowhere.py")
