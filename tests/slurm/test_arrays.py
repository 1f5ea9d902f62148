"""Sweeps as arrays of jobs, on stand-ins for SLURM's commands."""

import json
import re

import pytest

from bigtrain.cli import main as tables
from slurm import scheduler as slurm_scheduler
from tests.slurm.cluster_commands import COUNTING, events, slurm, told

NAMES = ["it's $(touch gone)", 'a "b" `c`; d', "plain"]
TEACHER = """
[[shared]]
name = "teacher"
per = ["known"]
settings = { leaves = "teacher.safetensors" }
leaves = { teacher = "teacher.safetensors" }
"""


@pytest.fixture
def sweep(tmp_path, scheduler):
    """Write a sweep file of the recipe without torch, and submit it; its folder is `out`."""

    def of(text="", options=(), top="", fails=0, names=("a", "b")):
        (tmp_path / "mine.toml").write_text(
            f"recipe = {json.dumps(COUNTING)}\nout = {json.dumps(str(tmp_path / 'out'))}\n"
            f'protocol = "uni-class"\nclasses = {json.dumps(list(names))}\n{top}\n{text}'
        )
        return slurm("sweep", tmp_path / "mine.toml", *options, fails=fails)

    return of


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def counts(out):
    """The last line of status."""
    return slurm("status", out).splitlines()[-1]


def test_array(sweep, out, scheduler):
    """A sweep is one array, whose runs have the settings that they were given, whatever their names are."""
    said = sweep(top="seeds = [0, 1]\nmax_parallel = 2", names=NAMES)
    assert "6 runs: 6 new; 6 to run" in said and "job 7: 6 runs\n" in said
    assert counts(out) == "6 runs: 6 waiting" and "0 to run" in sweep(top="seeds = [0, 1]", names=NAMES)
    assert {job.options["array"] for job in scheduler.jobs.values()} == {"0-5%2"}
    scheduler.run()
    assert counts(out) == "6 runs: 6 done" and "0 to run" in sweep(top="seeds = [0, 1]", names=NAMES)
    runs = sorted(path for path in out.iterdir() if path.is_dir() and path.name != "slurm")
    assert all(re.fullmatch(r"[\w.+=-]+", run.name, re.ASCII) for run in runs)
    assert {events(run)[0]["job"] for run in runs} == {f"7_{place}" for place in range(6)}
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert sorted((one["known"][0], one["seed"]) for one in results) == sorted((n, s) for n in NAMES for s in (0, 1))
    assert not list(out.parent.rglob("gone"))


def test_one_run_of_an_array_goes_on(sweep, out, scheduler):
    """A run of an array that has lost a process is queued again, by its own id; the others are as they were."""
    sweep("[settings]\nends = [86]\nends_after = 3")
    scheduler.run()
    assert told(out / "a") == told(out / "b") == ["submitted", "started", "requeued", "started", "finished"]
    assert [command[-1] for command in scheduler.asked if command[:2] == ("scontrol", "requeue")] == ["7_0", "7_1"]
    assert "requeued 1 times" in slurm("status", out).splitlines()[0]


def test_shared_run_comes_first(sweep, out, scheduler, capsys):
    """Shared runs are a job of their own, on which the jobs of the others depend; a table shows the others."""
    before = sweep(TEACHER, options=["--dry-run"])
    assert "a          known a  after teacher-a" in before and "teacher-a  shared  known a" in before
    assert "4 runs in " in before and "#SBATCH --array=0-3" in before and not out.exists() and not scheduler.jobs
    said = sweep(TEACHER)
    assert "job 7: 2 runs\n" in said and "job 8: 2 runs, after 7\n" in said
    scheduler.live("7_0")
    assert slurm("status", out).count("Dependency") == 2
    scheduler.run()
    assert counts(out) == "4 runs: 4 done"
    for known in ("a", "b"):
        assert not (out / f"teacher-{known}" / "student.safetensors").exists()
        flags = (out / known / "slurm" / "settings.toml").read_text()
        assert f"teacher = {json.dumps(str(out / f'teacher-{known}' / 'teacher.safetensors'))}\n" in flags
    assert tables(["tables", str(out)]) == 0
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    own = "50.0 .. 90.0"  # of the one seed, over its images
    assert rows[2:5] == [["a", "60.0", own, "1"], ["b", "60.0", own, "1"], ["mean", "60.0", "", "1"]]


def test_shared_run_fails(sweep, out, scheduler):
    """Runs whose shared run has failed say so; a retry begins with that one."""
    fails = TEACHER.replace("settings = { leaves", "settings = { ends = [1], leaves")
    sweep(fails)
    scheduler.run()
    assert counts(out) == "4 runs: 4 failed" and len(scheduler.children) == 2  # the other recipes were not started
    said = slurm("status", out)
    assert "teacher.safetensors is missing: the run teacher-a should have written it. Retry that one" in said
    assert slurm("retry", out).splitlines() == ["job 9: 2 runs", "job 10: 2 runs, after 9"]
    scheduler.run()
    assert counts(out) == "4 runs: 4 done"
    assert "4 runs: 4 done; nothing to submit again" in slurm("retry", out)


def test_live_shared_run(sweep, out, scheduler):
    """A sweep that is submitted again, and a retry, wait for the shared runs that are at work."""
    sweep(TEACHER)
    for run in ("a", "b"):
        slurm("cancel", out / run)
    assert slurm("retry", out / "a") == "job 9: 1 run\n"  # of one run's folder: nothing is known of the others
    slurm("cancel", out / "a")
    assert slurm("retry", out) == "job 10: 2 runs, after 7\n"
    slurm("cancel", out / "a")
    assert "4 runs: " in (said := sweep(TEACHER)) and "; 1 to run" in said and "job 11: 1 run, after 7\n" in said
    scheduler.run()
    assert counts(out) == "4 runs: 4 done"


def test_largest_array(sweep, out, scheduler):
    """More runs than an array may have are several arrays, one after the other."""
    scheduler.max_array_size = 3
    said = sweep("[axes]\nseed = [0, 1, 2]", names=["a", "b"])
    assert re.findall(r"job \d+:.*", said) == [
        "job 7: 2 runs", "job 8: 2 runs, after 7", "job 9: 2 runs, after 8"
    ]  # fmt: skip
    assert {job.options["array"] for job in scheduler.jobs.values()} == {"0-1%2"}
    scheduler.run()
    assert counts(out) == "6 runs: 6 done"


def test_cancel_and_retry(sweep, out, scheduler, monkeypatch):
    """cancel ends all waiting and running jobs, in few queries; retry submits only what has not succeeded."""
    monkeypatch.setattr(slurm_scheduler, "AT_ONCE", 2)
    sweep("[axes]\nseed = [0, 1]\n[settings]\nends = [1]\nends_after = 3")
    scheduler.live("7_0")
    assert counts(out) == "4 runs: 3 waiting, 1 failed"
    assert slurm("cancel", out) == "3 of 3 live jobs cancelled\n"
    assert [command[1:] for command in scheduler.asked if command[0] == "scancel"] == [("7_1", "7_2"), ("7_3",)]
    assert counts(out) == "4 runs: 3 cancelled, 1 failed" and slurm("cancel", out) == "nothing is running or waiting\n"
    (next(out.glob("b-*1")) / "results.json").write_text("{}")
    assert slurm("retry", out, "--timeout-min", 7) == "job 8: 3 runs\n"
    assert {job.options["time"] for name, job in scheduler.jobs.items() if name.startswith("8_")} == {"7"}
    scheduler.run()
    assert counts(out) == "4 runs: 2 done, 2 failed"


def test_refused_array(sweep, out, scheduler):
    """An array that sbatch refuses leaves no runs."""
    scheduler.refusal = "Invalid qos specification"
    said = sweep('[cluster]\nqos = "long"', fails=2)
    assert "sbatch refuses the job: Invalid qos specification. The line behind it: #SBATCH --qos=long." in said
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) in ([], ["slurm"])


def test_other_settings(sweep, out, scheduler):
    """A run that has begun does not change its settings."""
    sweep()
    scheduler.run()
    for run in ("a", "b"):
        (out / run / "results.json").unlink()
    said = sweep("[settings]\nsteps = 9", fails=2)
    assert f"{out / 'a'} holds a run with other settings than the sweep file now gives it" in said


def test_recipe_refuses_settings(sweep, out, tmp_path):
    """A recipe's refusal of a sweep file's settings is told in the recipe's words."""
    said = sweep("[settings]\nsteps = 0", fails=2)
    assert "the recipe refuses these settings." in said and "error: --steps is 0; it must be at least 1." in said
    assert not out.exists()


def test_logs_of_a_sweep(sweep, out, scheduler):
    """logs shows each run's; only one run is followed."""
    sweep()
    scheduler.run()
    said = slurm("logs", out)
    assert said.index(f"== {out}/slurm/7_0_0_log.out\ntraining ['a']") < said.index(f"== {out}/slurm/7_1_0_log.out")
    assert f"{out} holds 2 runs: name one of them, {out / 'a'} say, to follow it." in slurm("logs", out, "-f", fails=2)
