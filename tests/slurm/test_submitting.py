"""What is submitted, refused, looked at and cancelled, on stand-ins for SLURM's commands."""

import signal

import pytest

from slurm import scheduler as slurm_scheduler
from tests.slurm.cluster_commands import (
    COUNTING,
    in_attempt,
    slurm,
    status,
    submitted,
)


def test_submitted(submit, run, scheduler):
    """A job waits, runs and is done, and status says how it stands."""
    job = submit("--holds", 1)
    assert status(run) == ["waiting", job, "Priority"]
    seen = []

    def look():
        seen.append(status(run))
        scheduler.send(signal.SIGUSR2)

    scheduler.when(in_attempt(run, 1), look)
    scheduler.run()
    assert seen == [["running", job, "count 3 of 8"]]
    assert status(run) == ["done", job, "requeued 1 times"]
    assert "is finished, nothing to do" in slurm("submit", COUNTING, "--", "--out", run)
    assert [command[0] for command in scheduler.asked].count("sbatch") == 1


def test_no_second_submit(submit, run, scheduler):
    """A run that waits or is at work is not submitted again: the refusal names its job."""
    job = submit("--holds", 1)
    again = ["submit", COUNTING, "--", "--out", run]
    assert f"is waiting as job {job}: wait, or `bigtrain-slurm cancel " in slurm(*again, fails=2)
    said = []
    scheduler.when(in_attempt(run, 1), lambda: (said.append(slurm(*again, fails=2)), scheduler.send(signal.SIGUSR2)))
    scheduler.run()
    assert f"is running as job {job}: wait, or `bigtrain-slurm cancel " in said[0] and list(scheduler.jobs) == [job]


def test_cancelled_while_it_waits(submit, run, scheduler):
    job = submit()
    assert "1 of 1 live jobs cancelled" in slurm("cancel", run)
    scheduler.run()
    assert status(run)[:2] == ["cancelled", job] and not scheduler.children


def test_refused_by_sbatch(run, scheduler):
    """A refusal by sbatch is reported with its explanation, and leaves no files."""
    scheduler.refusal = "invalid partition specified: nowhere"
    said = slurm("submit", COUNTING, "--partition", "nowhere", "--", "--out", run, fails=2)
    assert "sbatch refuses the job: invalid partition specified: nowhere." in said
    assert "#SBATCH --partition=nowhere" in said and "There is low: 3 nodes of 2 CPUs, 4000 MB, no GPUs." in said
    assert not run.exists()


@pytest.mark.parametrize("gpus, most", [("(null)", 0), ("gpu:a100:4(S:0-1),gpu:2", 6)])
def test_more_gpus_than_a_node_has(run, scheduler, gpus, most):
    """Some SLURMs take such a job, and it waits forever: it is not submitted."""
    scheduler.gpus = gpus
    said = slurm("submit", COUNTING, "--gpus-per-node", 99, "--", "--out", run, fails=2)
    assert f"gpus_per_node is 99, and a node of the default partition has at most {most}: There is low: 3 nodes" in said
    assert not run.exists() and not scheduler.jobs


def test_submitted_from_inside_of_a_job(run, scheduler):
    """A job submitted from within another inherits where the controller is (SLURM_CONF), not that job's options."""
    inherited = {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8", "SBATCH_PARTITION": "x", "SLURM_CONF": "/etc/slurm.conf"}
    assert submitted(slurm("submit", COUNTING, "--", "--out", run, **inherited)) == "7"


def test_controller_down(submit, run, scheduler):
    """With the controller down nothing is submitted, and status falls back on the run folders."""
    submit("--ends", 1)
    scheduler.run()
    scheduler.is_down = True
    said = slurm("submit", COUNTING, "--", "--out", run.with_name("other"), fails=2)
    assert "bigtrain-slurm: error: sinfo: Unable to contact slurm controller" in said
    assert not run.with_name("other").exists() and status(run)[0] == "failed"
    with pytest.raises(slurm_scheduler.SchedulerError, match="Unable to contact"):  # not "unknown job"
        slurm_scheduler.states(["7"])


@pytest.mark.parametrize("state, how", [("CANCELLED by 1000", "cancelled"), ("OUT_OF_MEMORY", "failed"), ("", "lost")])
def test_forgotten_by_the_controller(submit, run, scheduler, state, how):
    """A job that the controller has forgotten is looked up in accounting, if there is any."""
    job = submit()
    del scheduler.jobs[job]
    if state:
        scheduler.forgotten[job] = state
    assert status(run)[:2] == [how, job]


def test_questions_about_many_jobs(scheduler):
    """The states of very many jobs take only a few queries, and each job gets its own state."""
    scheduler.forgotten = {str(number): "FAILED" for number in range(1100)}
    assert slurm_scheduler.states(map(str, range(1100))) == {
        str(number): slurm_scheduler.JobState("FAILED", "", "node1") for number in range(1100)
    }
    assert [command[0] for command in scheduler.asked] == ["squeue"] * 3 + ["sacct"] * 3


def test_missing_or_slow_commands(monkeypatch):
    """A command that is missing, fails or does not answer gives a one-sentence error."""
    for command, sentence in (
        (["no-such-command"], "no-such-command is not on the PATH"),
        (["false"], "false: it failed"),
        (["ls", "/nowhere"], "ls: .*No such file"),
        (["sleep", "5"], "sleep has not answered for 0.05 s: is its controller up"),
    ):
        monkeypatch.setattr(slurm_scheduler, "ANSWER_S", 0.05 if command[0] == "sleep" else 60)
        with pytest.raises(slurm_scheduler.SchedulerError, match=sentence):
            slurm_scheduler.ask(*command)


def test_logs_are_followed(submit, run, scheduler):
    """logs shows the end of a log, --all those of all processes, and --follow goes on until the run has ended."""
    job = submit("--ends", 86, "--ends-after", 2)
    assert f"{run}: no log yet (waiting: Priority)" in slurm("logs", run)
    scheduler.live(job)
    assert "training ['dog'] from step 0" in slurm("logs", run)
    assert slurm("logs", run, "--lines", 1) == "and more words\n"
    scheduler.when(lambda: True, scheduler.run)  # while it is followed
    said = slurm("logs", run, "--follow")
    assert said.index("from step 0") < said.index("from step 2") < said.index("trained ['dog']")
    assert slurm("logs", run, "--all").startswith(f"== {run}/slurm/{job}_0_log.out\n")
