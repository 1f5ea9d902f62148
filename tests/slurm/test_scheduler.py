"""Jobs on a real SLURM, stopped, killed, requeued and timed out, end with the bits of an undisturbed run."""

import json
import os

import pytest

from tests.launching import run as run_forked
from tests.runs import losses
from tests.slurm.cluster_commands import (
    COUNTING,
    RECIPE,
    ask,
    events,
    nodes_of,
    same_bits,
    slurm,
    steps,
    submitted,
    told,
    until,
    until_attempt,
    until_done,
    until_training,
    whys,
)

LOST = "ended unexpectedly"
pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


def test_signal_requeue_preemption(long_run, undisturbed, tmp_path):
    """A job goes on under its id after a signal, a requeue and a preemption, to the bits of a quiet run."""
    run = tmp_path / "run"
    job = submitted(slurm("submit", RECIPE, "--", *long_run, "--out", run))
    until_training(run)
    assert "running" in slurm("status", run)
    ask(f"scancel --signal=USR2 {job}")
    until_attempt(run, 2)
    until_training(run)
    ask(f"scontrol requeue {job}")
    until_attempt(run, 3)
    until_training(run)
    if high := preempting_partition():
        nodes = ask("sinfo -h -o %D -p " + high)
        ask(f"sbatch -p {high} -N {nodes} --exclusive -t 1 -o /dev/null --wrap 'sleep 3'")
        until_attempt(run, 4)
    until_done(run)
    assert {row["job"] for row in events(run)} == {job}
    why = whys(run)
    assert why[0] == "asked to stop (SIGUSR2)" and len(why) == 2 + bool(high)
    assert why[1].startswith(("by SLURM: preemption, or an operator", LOST))  # SLURM kills one that is slow to save
    starts = [row["at"] for row in events(run) if row["event"] == "started"]
    assert len(set(starts)) == len(starts), "each attempt begins where the one before has saved"
    assert f"requeued {len(why)} times" in slurm("status", run)
    assert same_bits(run, undisturbed(1))


def preempting_partition():
    """A partition whose jobs preempt those of the default one; only on a throw-away cluster."""
    if "BIGTRAIN_TEST_SLURM" not in os.environ:
        return ""
    rows = [dict(word.split("=", 1) for word in row.split()) for row in ask("scontrol -o show partition").splitlines()]
    (default,) = [row for row in rows if row["Default"] == "YES"]
    higher = [row["PartitionName"] for row in rows if int(row["PriorityTier"]) > int(default["PriorityTier"])]
    return higher[0] if higher and default["PreemptMode"] == "REQUEUE" else ""


def test_power_failures(long_run, undisturbed, tmp_path, power):
    """A job of two nodes goes on after either has lost its power, to the bits of a quiet run."""
    run, quiet = tmp_path / "run", undisturbed(2)
    job = submitted(slurm("submit", RECIPE, "--nodes", "2", "--", *long_run, "--out", run))
    for number, which in ((2, 1), (3, 0)):  # the other node; the one with rank 0 and the batch script
        until_training(run)
        power.off(nodes_of(job)[which])
        until(lambda: told(run)[-1] == "requeued" or not is_running(job), "the loss of a node", 60)
        power.all_on()
        until_attempt(run, number)
    until_done(run)
    assert {row["job"] for row in events(run)} == {job}
    assert len(whys(run)) == 2 and whys(run)[1].startswith(LOST)
    assert same_bits(run, quiet)


def is_running(job):
    return bool(ask(f"squeue -h -j {job} -t running"))


def until_holding(run, number):
    """Wait until this many attempts of the recipe without torch have done their steps; the last one then holds."""
    until(
        lambda: told(run).count("started") >= number and steps(run) >= 3 * number,
        f"attempt {number} of {run}: {told(run)}",
    )


def test_time_limit_cancel_retry(tmp_path):
    """A job goes on after its time, until it is cancelled, and can be tried again."""
    run = tmp_path / "run"
    flags = ["--timeout-min", "1", "--signal-delay-s", "30"]
    endless = ["--holds", "99", "--steps", "100000", "--out", run]
    job = submitted(slurm("submit", COUNTING, *flags, "--", *endless))
    until_holding(run, 1)
    assert f" as job {job}: wait, or `bigtrain-slurm cancel " in slurm("submit", COUNTING, "--", *endless, fails=2)
    until_holding(run, 2)
    assert set(whys(run)) == {"the time limit"}
    ask(f"scancel {job}")
    until(lambda: "cancelled" in slurm("status", run), "cancelled")
    number = told(run).count("started")  # a busy machine has had more than two
    assert "nothing is running or waiting" in slurm("cancel", run)
    again = submitted(slurm("retry", run))
    assert again != job
    until_holding(run, number + 1)
    assert "1 of 1 live jobs cancelled" in slurm("cancel", run)
    until(lambda: "cancelled" in slurm("status", run), "cancelled")


def test_losses_on_several_nodes(small, tmp_path):
    """Processes on several nodes have the losses of one."""
    alone, four, three = (tmp_path / name for name in ("alone", "four", "three"))
    divides = "--train-limit 48 --tune-batch 12 --distil-batch 12"  # among 3 processes and among 4
    flags = [*small, *divides.split(), "--drop-path", "0", "--out"]
    slurm("submit", RECIPE, "--nodes", "2", "--tasks-per-node", "2", "--", *flags, four)
    slurm("submit", RECIPE, "--nodes", "3", "--strategy", "zero2", "--", *flags, three)
    done = run_forked("defend.py", *flags, alone)
    assert done.returncode == 0, done.stderr
    until_done(four, three, wait_s=400)
    for other in (four, three):
        assert len(losses(alone)) == 12 and losses(other) == pytest.approx(losses(alone), abs=1e-5)
    assert [row["processes"] for row in events(four) if row["event"] == "started"] == [4]


def test_error_of_the_rank_that_failed(tmp_path, cluster):
    """The error of the rank that failed is what the user sees."""
    run, error = tmp_path / "run", "ZeroDivisionError: rank 1 has divided by nothing"
    fails = ["--ends", 1, "--ends-rank", 1, "--error", error, "--holds", 1]
    slurm("submit", COUNTING, "--nodes", "2", "--", *fails, "--out", run)
    until(lambda: "failed" in told(run), "failing")
    said = until(lambda: "failed" in (said := slurm("status", run)) and said, "that status says so")
    assert f"{error} (rank 1 on " in said
    until(lambda: not cluster(), "the end of the other rank", 150)
    assert "ZeroDivisionError" in slurm("logs", run) and "Traceback" in slurm("logs", run)
    assert told(run).count("started") == 1


def test_held_by_another_job(tmp_path, cluster):
    """A run that another job holds is refused, and a dead one loses it."""
    run = tmp_path / "run"
    endless = ["--holds", "99", "--steps", "100000", "--out", run]
    job = submitted(slurm("submit", COUNTING, "--", *endless))
    until_holding(run, 1)
    owner = run / "slurm" / "owner.json"
    assert json.loads(owner.read_text())["job"] == job
    history = run / "events.jsonl"
    before = history.read_text()
    history.write_text("")  # so that submit does not see it
    other = submitted(slurm("submit", COUNTING, "--", *endless))
    until(lambda: "failed" in told(run), "the refusal")
    assert f"the run is held by job {job} on " in events(run)[-1]["error"]
    assert json.loads(owner.read_text())["job"] == job
    history.write_text(before)
    ask(f"scancel --signal=KILL {job}.0")
    until(lambda: not cluster(), "the end")
    assert owner.exists() and "Exited" not in slurm("status", run)
    slurm("retry", run)
    until_attempt(run, 2)
    assert json.loads(owner.read_text())["job"] not in (job, other)


def test_folder_not_shared(tmp_path, power):
    """A job ends with a sentence where one of its nodes does not see its folder."""
    place = tmp_path / "mine"
    place.mkdir()
    nodes = sorted(set(ask("sinfo -h -N -o %N").split()))
    ask(f"srun -w {nodes[1]} --chdir=/ mount -t tmpfs none {place}")
    try:
        run = place / "run"
        slurm("submit", COUNTING, "--nodes", "2", "--exclude", ",".join(nodes[2:]), "--", "--out", run)
        said = until(lambda: "failed" in (said := slurm("status", run)) and said, "that status says so")
        assert "bigtrain-slurm: error: not all nodes of this job see its folder: choose one on a shared" in said
        assert "started" not in told(run)
    finally:
        ask(f"srun -w {nodes[1]} --chdir=/ umount {place}")
