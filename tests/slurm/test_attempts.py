"""Jobs that are asked to stop, killed, requeued, timed out or locked out, on a fake SLURM and a simulated clock."""

import json
import os
import pickle
import signal
from itertools import pairwise

import pytest

from slurm import attempt
from slurm.attempt import run_attempt
from tests.slurm.cluster_commands import (
    events,
    in_attempt,
    same_bits,
    slurm,
    status,
    steps,
    submitted,
    told,
    whys,
)

LEFT = ("student.safetensors",)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop(submit, run, scheduler, counted, number):
    """A job asked to stop is requeued under its id, resumes from its checkpoint, and ends bit for bit the same."""
    job = submit("--holds", 1)
    scheduler.when(in_attempt(run, 1), lambda: scheduler.send(number))
    scheduler.run()
    assert told(run) == ["submitted", "started", "requeued", "started", "finished"]
    assert {row["job"] for row in events(run)} == {job} and whys(run) == [f"asked to stop ({number.name})"]
    assert [row["at"] for row in events(run) if row["event"] == "started"] == ["", "count/step-000003"]
    assert ("scontrol", "requeue", job) in scheduler.asked
    assert steps(run) == 8 and same_bits(run, counted, LEFT)
    assert not (run / "slurm" / "owner.json").exists()


def test_asked_before_recipe_listens(submit, run, scheduler):
    """A signal that ends a recipe before it has installed its handlers is not a failure."""
    submit("--steps", 300)
    scheduler.when(lambda: scheduler.children, lambda: scheduler.send(signal.SIGTERM))
    scheduler.run()
    assert whys(run) == ["asked to stop (SIGTERM)"] and told(run)[-1] == "finished" and steps(run) == 300


def test_asked_before_recipe_starts(submit, run, scheduler, monkeypatch):
    """A job asked to stop before its recipe has started is requeued without starting it."""
    submit()
    begin = attempt.begin

    def told_meanwhile(task, job):
        monkeypatch.setattr(attempt, "begin", begin)
        os.kill(os.getpid(), signal.SIGUSR2)
        return begin(task, job)

    monkeypatch.setattr(attempt, "begin", told_meanwhile)
    scheduler.run()
    assert whys(run) == ["asked to stop (SIGUSR2)"] and len(scheduler.children) == 1
    assert told(run)[-1] == "finished"


def test_stop_before_an_attempt(run):
    """A signal that submitit gets before an attempt has begun queues the same attempt again."""
    again = attempt.Attempt(str(run)).checkpoint()
    assert isinstance(again.function, attempt.Attempt) and again.function.run == str(run) and not again.args


def test_time_limit(submit, run, scheduler, counted):
    """A job is asked to stop before its time limit, and resumes in its next attempt."""
    submit("--holds", 2, options=["--timeout-min", 30, "--signal-delay-s", 90])
    for number in (1, 2):
        scheduler.when(in_attempt(run, number), lambda: scheduler.clock.pass_by(30 * 60 - 90))
    scheduler.run()
    assert whys(run) == ["the time limit"] * 2 and same_bits(run, counted, LEFT)


def test_not_yet_the_time_limit(submit, run, scheduler):
    """A job asked to stop long before its time limit does not report the time limit as the reason."""
    submit("--holds", 1)
    scheduler.when(in_attempt(run, 1), lambda: (scheduler.clock.pass_by(50 * 60), scheduler.send(signal.SIGUSR2)))
    scheduler.run()
    assert whys(run) == ["asked to stop (SIGUSR2)"]


def test_time_limit_without_saving(submit, run, scheduler, counted):
    """A job that does not stop in time is reported so by status, and resumes when it is retried."""
    submit("--holds", 1, "--deaf")
    scheduler.when(in_attempt(run, 1), lambda: scheduler.clock.pass_by(60 * 60))
    scheduler.run()
    assert status(run)[0] == "failed" and "ran into its time limit before it could save" in slurm("status", run)
    assert submitted(slurm("retry", run)) == "8"
    scheduler.run()
    assert status(run)[:2] == ["done", "8"] and same_bits(run, counted, LEFT) and steps(run) == 8


def test_requeued_by_slurm(submit, run, scheduler, counted):
    """A job that SLURM has queued again, by preemption or by an operator, is not queued twice."""
    job = submit("--holds", 1)
    scheduler.when(in_attempt(run, 1), lambda: scheduler.requeue(job))
    scheduler.run()
    assert whys(run) == ["by SLURM: preemption, or an operator"]
    assert ("scontrol", "requeue", job) not in scheduler.asked and same_bits(run, counted, LEFT)


def test_lost_node(submit, run, scheduler, counted):
    """An attempt that ends without recording it is detected by the next, which takes over the run."""
    job = submit("--holds", 2)
    for number in (1, 2):
        scheduler.when(in_attempt(run, number), scheduler.kill)
    scheduler.run()
    assert told(run) == ["submitted", "started", "lost", "started", "lost", "started", "finished"]
    assert {row["job"] for row in events(run)} == {job}
    assert all(why.startswith("ended unexpectedly: its node failed") for why in whys(run))
    assert status(run)[2] == "requeued 2 times" and same_bits(run, counted, LEFT)


@pytest.mark.parametrize(
    "code, why",
    [
        (86, "one of its processes died, hung or could not be reached"),
        (-9, "killed by SIGKILL"),
        (-11, "killed by SIGSEGV"),
    ],
)
def test_lost_process(submit, run, scheduler, counted, code, why):
    """A recipe that is killed, or has lost another rank, resumes at once from its checkpoint."""
    submit("--ends", code, "--ends-after", 2)
    scheduler.run()
    assert whys(run) == [why] and [row["delay_s"] for row in events(run) if row["event"] == "requeued"] == [0]
    assert steps(run) == 8 and same_bits(run, counted, LEFT)


def test_idle_attempts_wait(submit, run, scheduler, counted):
    """After attempts without progress, the delay before the next doubles, up to ten minutes."""
    job = submit("--ends", *[86] * 8)
    scheduler.run()
    delays = [15, 30, 60, 120, 240, 480, 600, 600]
    assert [row["delay_s"] for row in events(run) if row["event"] == "requeued"] == delays
    began = scheduler.jobs[job].began
    waited = [after - before for before, after in pairwise(began)]
    assert all(delay <= wait for delay, wait in zip(delays, waited, strict=True))
    assert [c[-1] for c in scheduler.asked if c[:2] == ("scontrol", "update")] == [f"StartTime=now+{d}" for d in delays]
    assert same_bits(run, counted, LEFT)


def test_max_attempts(submit, run, scheduler, counted):
    """A job is started max_attempts times at most; a retry gives it new attempts."""
    job = submit("--ends", 86, 86, 86, "--ends-after", 2, options=["--max-attempts", 2])
    scheduler.run()
    assert told(run).count("started") == 2 and scheduler.jobs[job].state == "FAILED"
    assert "the job has been started 2 times (max_attempts): `bigtrain-slurm retry` submits it again." in status(run)[2]
    again = submitted(slurm("retry", run))
    scheduler.run()
    assert status(run) == ["done", again, "requeued 1 times"] and same_bits(run, counted, LEFT)


def test_failed(submit, run, scheduler, counted):
    """A recipe's mistake ends its job; status says its last error, logs show the rest, and a retry goes on."""
    job = submit("--ends", 1, "--ends-after", 2, "--error", "ZeroDivisionError: by nothing")
    scheduler.run()
    assert told(run) == ["submitted", "started", "failed"] and scheduler.jobs[job].state == "FAILED"
    assert events(run)[-1]["code"] == 1 and not (run / "slurm" / "owner.json").exists()
    assert status(run) == ["failed", job, "ZeroDivisionError: by nothing"]
    assert "Traceback" in slurm("logs", run) and "and more words" in slurm("logs", run)
    again = submitted(slurm("retry", run))
    scheduler.run()
    assert status(run) == ["done", again] and steps(run) == 8 and same_bits(run, counted, LEFT)
    assert "1 runs: 1 done; nothing to submit again" in slurm("retry", run)


def test_stop_file(submit, run, scheduler, counted):
    """A file `stop` in the run's folder ends its job, which is not queued again."""
    job = submit("--holds", 1)
    scheduler.when(in_attempt(run, 1), (run / "stop").touch)
    scheduler.run()
    assert told(run) == ["submitted", "started", "stopped"] and scheduler.jobs[job].state == "COMPLETED"
    assert status(run)[:2] == ["stopped", job]
    slurm("retry", run)
    scheduler.run()
    assert status(run)[0] == "done" and same_bits(run, counted, LEFT)


@pytest.mark.parametrize("by_user", [True, False], ids=["bigtrain-slurm", "scancel"])
def test_cancelled(submit, run, scheduler, counted, by_user):
    """A job that is cancelled saves, is not queued again, and can be tried again."""
    job, said = submit("--holds", 1), []
    cancel = (lambda: said.append(slurm("cancel", run))) if by_user else (lambda: scheduler.scancel(job))
    scheduler.when(in_attempt(run, 1), cancel)
    scheduler.run()
    assert not by_user or "1 of 1 live jobs cancelled" in said[0]
    assert [row.get("why") == "by bigtrain-slurm cancel" for row in events(run)].count(True) == by_user
    assert told(run)[-1] == "cancelled" and status(run)[:2] == ["cancelled", job]
    assert scheduler.jobs[job].state == "CANCELLED" and ("scontrol", "requeue", job) not in scheduler.asked
    assert "nothing is running or waiting" in slurm("cancel", run)
    again = submitted(slurm("retry", run))
    assert again != job
    scheduler.run()
    assert status(run)[:2] == ["done", again] and same_bits(run, counted, LEFT)


def test_held_by_another_job(submit, run, scheduler, counted):
    """A job whose run is held by another job ends with an error message; the other continues."""
    job, history, refused = submit("--holds", 1), run / "events.jsonl", []

    def second():
        before = history.read_text()
        history.write_text("")  # so that submit does not see it
        other = submit()
        refused.extend([scheduler.live(other), status(run), json.loads((run / "slurm/owner.json").read_text())["job"]])
        history.write_text(before)
        scheduler.send(signal.SIGUSR2)

    scheduler.when(in_attempt(run, 1), second)
    scheduler.run()
    end_of_it, (how, _, why), owner = refused
    assert (end_of_it, how, owner) == ("FAILED", "failed", job) and f"the run is held by job {job} on " in why
    assert told(run)[-1] == "finished" and events(run)[-1]["job"] == job and same_bits(run, counted, LEFT)


def test_dead_owner_loses_the_run(submit, run, scheduler, counted):
    """A run whose job ended without recording it is `lost` until a retry submits a job that takes it over."""
    job = submit("--holds", 1)
    scheduler.when(in_attempt(run, 1), lambda: scheduler.kill("COMPLETED"))
    scheduler.run()
    assert json.loads((run / "slurm" / "owner.json").read_text())["job"] == job
    assert status(run) == ["lost", job, "its last attempt ended unexpectedly"]
    again = submitted(slurm("retry", run))
    scheduler.run()
    assert status(run)[:2] == ["done", again] and same_bits(run, counted, LEFT)


def test_cannot_be_queued_again(submit, run, scheduler, monkeypatch):
    """A job that SLURM does not queue again has failed, and says why."""
    submit("--ends", 86)
    monkeypatch.setattr(scheduler, "scontrol", refuse("Requested operation is presently disabled", scheduler.scontrol))
    scheduler.run()
    assert status(run)[0] == "failed" and "it could not be requeued: scontrol: " in status(run)[2]
    assert "is presently disabled" in status(run)[2]


def refuse(why, others):
    def scontrol(*words):
        if words[0] == "requeue":
            raise LookupError(why)
        return others(*words)

    return scontrol


def test_folder_without_job(run, scheduler):
    """An attempt in a folder without a job file ends with an error message."""
    run.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SUBMITIT_EXECUTOR", "slurm")
        patched.setenv("SLURM_JOB_ID", "7")
        assert run_attempt(run) == 2
    assert "holds no job of bigtrain-slurm" in events(run)[-1]["error"]


def test_job_of_an_earlier_version(tmp_path):
    """A job that an earlier version submitted is unpickled as an attempt: its class was slurm.life.Life."""
    pickled = b"cslurm.life\nLife\n)\x81}\x8c\x03run\x8c\x04/runsb."
    attempt_of_old = pickle.loads(pickled)
    assert isinstance(attempt_of_old, attempt.Attempt) and attempt_of_old.run == "/run"
