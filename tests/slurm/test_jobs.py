"""Jobs on a real SLURM: they are told to leave, killed, moved and cut off, and end with the bits of a quiet run."""

import json
import os

import pytest

from tests.slurm.conftest import (
    RECIPE,
    ask,
    events,
    nodes_of,
    same_bits,
    slurm,
    submitted,
    told,
    until,
    until_done,
    until_life,
    until_training,
)

LOST = "ended without a word"
pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


def test_a_job_goes_on_under_its_id_after_a_signal_a_requeue_and_a_preemption(long_run, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = submitted(slurm("submit", RECIPE, "--", *long_run, "--out", run))
    until_training(run)
    assert "running" in slurm("status", run)
    ask(f"scancel --signal=USR2 {job}")
    until_life(run, 2)
    until_training(run)
    ask(f"scontrol requeue {job}")
    until_life(run, 3)
    until_training(run)
    if high := preempting_partition():
        nodes = ask("sinfo -h -o %D -p " + high)
        ask(f"sbatch -p {high} -N {nodes} --exclusive -t 1 -o /dev/null --wrap 'sleep 3'")
        until_life(run, 4)
    until_done(run)
    assert {row["job"] for row in events(run)} == {job}
    why = [row["why"] for row in events(run) if row["event"] in ("requeued", "lost")]
    assert why[0] == "told to leave (SIGUSR2)" and len(why) == 2 + bool(high)
    assert why[1].startswith(("by SLURM: preemption, or an operator", LOST))  # SLURM kills one that is slow to save
    starts = [row["at"] for row in events(run) if row["event"] == "started"]
    assert len(set(starts)) == len(starts), "each life begins where the one before has saved"
    assert f"requeued {len(why)} times" in slurm("status", run)
    assert same_bits(run, undisturbed(1))


def preempting_partition():
    """One whose jobs push those of the default partition back into the queue; only of a throw-away cluster."""
    if "BIGTRAIN_TEST_SLURM" not in os.environ:
        return ""
    rows = [dict(word.split("=", 1) for word in row.split()) for row in ask("scontrol -o show partition").splitlines()]
    (default,) = [row for row in rows if row["Default"] == "YES"]
    higher = [row["PartitionName"] for row in rows if int(row["PriorityTier"]) > int(default["PriorityTier"])]
    return higher[0] if higher and default["PreemptMode"] == "REQUEUE" else ""


def test_a_job_of_two_nodes_goes_on_after_either_has_lost_its_power(long_run, undisturbed, tmp_path, power):
    run, quiet = tmp_path / "run", undisturbed(2)
    job = submitted(slurm("submit", RECIPE, "--nodes", "2", "--", *long_run, "--out", run))
    for life, which in ((2, 1), (3, 0)):  # the other node; the one with rank 0 and the batch script
        until_training(run)
        power.off(nodes_of(job)[which])
        until(lambda: told(run)[-1] == "requeued" or not is_running(job), "the loss of a node", 60)
        power.all_on()
        until_life(run, life)
    until_done(run)
    assert {row["job"] for row in events(run)} == {job}
    whys = [row["why"] for row in events(run) if row["event"] in ("requeued", "lost")]
    assert len(whys) == 2 and whys[1].startswith(LOST)
    assert same_bits(run, quiet)


def is_running(job):
    return bool(ask(f"squeue -h -j {job} -t running"))


def test_a_job_goes_on_after_its_time_until_it_is_cancelled_and_can_be_tried_again(long_run, tmp_path):
    run = tmp_path / "run"
    flags = ["--timeout-min", "1", "--signal-delay-s", "30"]
    endless = [*long_run, "--distil-epochs", "100000", "--out", run]
    job = submitted(slurm("submit", RECIPE, *flags, "--", *endless))
    until_training(run)
    assert f" as job {job}: wait, or `bigtrain-slurm cancel " in slurm("submit", RECIPE, "--", *endless, fails=2)
    until_life(run, 2)
    until_training(run)
    assert {row["why"] for row in events(run) if row["event"] == "requeued"} == {"the time limit"}
    ask(f"scancel {job}")
    until(lambda: "cancelled" in slurm("status", run), "cancelled")
    lives = told(run).count("started")  # a busy machine has had more than two
    assert "nothing is running or waiting" in slurm("cancel", run)
    again = submitted(slurm("retry", run))
    assert again != job
    until_life(run, lives + 1)
    until_training(run)
    assert "1 of 1 live jobs cancelled" in slurm("cancel", run)
    until(lambda: "cancelled" in slurm("status", run), "cancelled")


def test_processes_on_several_nodes_have_the_losses_of_one(small, tmp_path):
    alone, four, three = (tmp_path / name for name in ("alone", "four", "three"))
    flags = [*small, "--drop-path", "0", "--out"]
    slurm("submit", RECIPE, "--", *flags, alone)
    slurm("submit", RECIPE, "--nodes", "2", "--tasks-per-node", "2", "--", *flags, four)
    slurm("submit", RECIPE, "--nodes", "3", "--strategy", "zero2", "--", *flags, three)
    until_done(alone, four, three, wait_s=400)
    for other in (four, three):
        assert len(losses(alone)) == 12 and losses(other) == pytest.approx(losses(alone), abs=1e-5)
    assert [row["processes"] for row in events(four) if row["event"] == "started"] == [4]


def losses(run):
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_the_error_of_the_rank_that_failed_is_what_the_user_sees(small, tmp_path, cluster):
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import os, sys\n"
        f"sys.argv[0] = {RECIPE!r}\n"
        "if '--print-config' not in sys.argv and os.environ['RANK'] == '1':\n"
        "    raise ZeroDivisionError('rank 1 has divided by nothing')\n"
        "from recipes.defend import main\n"
        "main()\n"
    )
    slurm("submit", recipe, "--nodes", "2", "--", *small, "--out", run)
    until(lambda: "failed" in told(run), "failing")
    said = until(lambda: "failed" in (said := slurm("status", run)) and said, "that status says so")
    assert "ZeroDivisionError: rank 1 has divided by nothing (rank 1 on " in said
    until(lambda: not cluster(), "the end of the other rank", 150)
    assert "ZeroDivisionError" in slurm("logs", run) and "Traceback" in slurm("logs", run)
    assert told(run).count("started") == 1


def test_a_run_that_another_job_holds_is_refused_and_a_dead_one_loses_it(long_run, tmp_path, cluster):
    run = tmp_path / "run"
    job = submitted(slurm("submit", RECIPE, "--", *long_run, "--distil-epochs", "100000", "--out", run))
    until_training(run)
    owner = run / "slurm" / "owner.json"
    assert json.loads(owner.read_text())["job"] == job
    history = run / "events.jsonl"
    before = history.read_text()
    history.write_text("")  # so that submit does not see it
    other = submitted(slurm("submit", RECIPE, "--", *long_run, "--distil-epochs", "100000", "--out", run))
    until(lambda: "failed" in told(run), "the refusal")
    assert f"the run is held by job {job} on " in events(run)[-1]["error"]
    assert json.loads(owner.read_text())["job"] == job
    history.write_text(before)
    ask(f"scancel --signal=KILL {job}.0")
    until(lambda: not cluster(), "the end")
    assert owner.exists() and "Exited" not in slurm("status", run)
    slurm("retry", run)
    until_life(run, 2)
    assert json.loads(owner.read_text())["job"] not in (job, other)


def test_a_folder_that_another_node_does_not_see_is_told(small, tmp_path, power):
    place = tmp_path / "mine"
    place.mkdir()
    nodes = sorted(set(ask("sinfo -h -N -o %N").split()))
    ask(f"srun -w {nodes[1]} --chdir=/ mount -t tmpfs none {place}")
    try:
        run = place / "run"
        slurm("submit", RECIPE, "--nodes", "2", "--exclude", ",".join(nodes[2:]), "--", *small, "--out", run)
        said = until(lambda: "failed" in (said := slurm("status", run)) and said, "that status says so")
        assert "bigtrain-slurm: error: not all nodes of this job see its folder: choose one on a shared" in said
        assert "started" not in told(run)
    finally:
        ask(f"srun -w {nodes[1]} --chdir=/ umount {place}")
