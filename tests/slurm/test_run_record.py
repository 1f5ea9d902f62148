"""Who owns a run, its history, and its status; SLURM's answers are mocked."""

import json
import signal
import socket
import subprocess

import pytest

from slurm import run_record, status
from slurm import scheduler as slurm_scheduler
from slurm.attempt import begin, last_error
from slurm.attempt_end import decide, end
from slurm.cluster import Cluster
from slurm.local import outcome
from slurm.process import Process
from slurm.run_record import JobSpec, RunLock, events, idle_attempts, position, record_event
from slurm.scheduler import seconds_left
from slurm.status import print_from


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    JobSpec("recipe.py", ("--known", "it's"), "/", Cluster(setup=("module load cuda",)), str(folder / "slurm")).write(
        folder
    )
    return folder


def states(monkeypatch, **known):
    monkeypatch.setattr(slurm_scheduler, "states", lambda ids: {i: known[f"j{i}"] for i in ids if f"j{i}" in known})


def test_job_file(run):
    """A job is read as it was written."""
    assert JobSpec.read(run) == JobSpec(
        "recipe.py", ("--known", "it's"), "/", Cluster(setup=("module load cuda",)), str(run / "slurm")
    )
    (run / "slurm" / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no job of bigtrain-slurm"):
        JobSpec.read(run)


def test_owner(run, monkeypatch):
    """A run belongs to one job while that is alive."""
    states(monkeypatch, j1=slurm_scheduler.JobState("RUNNING"))
    RunLock(run, "1").acquire()
    RunLock(run, "1").acquire()  # the same job's next attempt
    with pytest.raises(ValueError, match=r"held by job 1 on .*, which is still running: wait for it, or cancel it"):
        RunLock(run, "2").acquire()
    RunLock(run, "2").release()  # is not its own
    states(monkeypatch, j1=slurm_scheduler.JobState("FAILED"))
    mine = RunLock(run, "2")
    mine.acquire()
    assert json.loads(mine.file.read_text())["job"] == "2"
    mine.release()
    assert sorted(file.name for file in (run / "slurm").iterdir()) == ["job.json"]


def test_owner_without_slurm(run, monkeypatch):
    """An owner whose state cannot be queried is assumed to be alive."""

    def gone(ids):
        raise slurm_scheduler.SchedulerError("no")

    RunLock(run, "1").acquire()
    monkeypatch.setattr(slurm_scheduler, "states", gone)
    with pytest.raises(ValueError, match="held by job 1"):
        RunLock(run, "2").acquire()


def test_dead_local_owner(run):
    """A process of this machine that has ended no longer owns its run."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    (run / "slurm" / "owner.json").write_text(
        json.dumps({"job": f"local-{ended.pid}", "host": socket.gethostname(), "pid": ended.pid})
    )
    RunLock(run, "2").acquire()


def test_half_a_row(run):
    """Half a row of history is left out."""
    record_event(run, "started", job="1")
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "requ')
    assert [row["event"] for row in events(run)] == ["started"]


def test_idle_attempts(run):
    """Attempts that got no further are counted."""
    for at in ("", "", "distil/step-000004", "distil/step-000008", "distil/step-000008"):
        record_event(run, "started", job="1", at=at)
    record_event(run, "started", job="2", at="distil/step-000008")
    assert idle_attempts(events(run), "1", "distil/step-000008") == 2
    assert idle_attempts(events(run), "1", "distil/step-000012") == 0
    (run / "checkpoints" / "distil" / "step-000008").mkdir(parents=True)
    (run / "checkpoints" / "distil" / "step-000012.tmp").mkdir()
    (run / "teacher.safetensors").touch()
    assert position(run) == "distil/step-000008 teacher.safetensors"


@pytest.mark.parametrize(
    "rows, state, how, told",
    [
        ([], None, "new", "not submitted yet"),
        (["submitted"], slurm_scheduler.JobState("PENDING", "Priority"), "waiting", "Priority"),
        (["submitted", "started"], slurm_scheduler.JobState("RUNNING"), "running", "starting"),
        (
            ["submitted", "started", "requeued"],
            slurm_scheduler.JobState("PENDING", "BeginTime"),
            "waiting",
            "BeginTime",
        ),
        (
            ["submitted", "started", "failed"],
            slurm_scheduler.JobState("FAILED"),
            "failed",
            "ValueError: no (rank 3 on node2)",
        ),
        (["submitted", "started", "failed"], None, "failed", "ValueError: no (rank 3 on node2)"),
        (["submitted", "started", "cancelled"], slurm_scheduler.JobState("CANCELLED"), "cancelled", ""),
        (["submitted"], slurm_scheduler.JobState("CANCELLED"), "cancelled", ""),
        (["submitted", "started", "stopped"], slurm_scheduler.JobState("COMPLETED"), "stopped", ""),
        (["submitted", "started"], slurm_scheduler.JobState("OUT_OF_MEMORY"), "failed", "out of memory: raise mem_gb"),
        (["submitted", "started"], slurm_scheduler.JobState("TIMEOUT"), "failed", "raise signal_delay_s"),
        (["submitted", "started"], None, "lost", "its last attempt ended unexpectedly"),
        (["submitted"], None, "lost", "which never started"),
    ],
)
def test_status(run, monkeypatch, rows, state, how, told):
    """The status of a run."""
    for row in rows:
        further = {"error": "ValueError: no", "rank": 3} if row == "failed" else {}
        monkeypatch.setattr(run_record.socket, "gethostname", lambda: "node2")
        record_event(run, row, job="7", **further)
    states(monkeypatch, **({"j7": state} if state else {}))
    (one,) = status.statuses([run])
    assert (one.state, one.job) == (how, "7" if rows else "") and told in one.detail
    assert one.requeued == rows.count("requeued")


def test_done(run, monkeypatch):
    """A finished run is done, whatever SLURM says."""
    states(monkeypatch)
    record_event(run, "submitted", job="7")
    (run / "results.json").write_text("{}")
    (one,) = status.statuses([run])
    assert one.state == "done" and outcome(run) == "finished"


def test_finished_in_the_next_attempt(run):
    """A run killed after writing its results but before recording `finished` records it in its next attempt."""
    for row in ("submitted", "started"):
        record_event(run, row, job="7", restarts=0)
    (run / "results.json").write_text("{}")
    for restarts in (1, 2):
        assert begin(Process(run, "7", restarts, 0, 1, 0, 1, "node1", on_slurm=True), JobSpec.read(run)) is None
    assert [row["event"] for row in events(run)] == ["submitted", "started", "finished"]


def test_not_queued_twice(run, monkeypatch):
    """A job that SLURM has queued again is not queued twice."""
    again = []
    monkeypatch.setattr(slurm_scheduler, "requeue", lambda job, delay_s: again.append((job, delay_s)))
    task = Process(run, "7", 1, 0, 1, 0, 1, "node1", on_slurm=True)
    for restarts, why in ((2, "by SLURM: preemption, or an operator"), (1, "asked to stop (SIGTERM)")):
        monkeypatch.setattr(
            slurm_scheduler, "described", lambda job, r=restarts: slurm_scheduler.JobRecord("RUNNING", r)
        )
        assert decide(task, 85, "", signal.SIGTERM, True) == 0
        assert (events(run)[-1]["event"], events(run)[-1]["why"]) == ("requeued", why)
    assert again == [("7", 0)]


@pytest.mark.parametrize(
    "code, event", [(-15, "stopped"), (85, "stopped"), (130, "stopped"), (-9, "failed"), (86, "failed")]
)
def test_end_of_a_local_job(run, code, event):
    """Without SLURM a recipe asked to stop counts as stopped, even if the signal killed it, and one that was lost as
    failed: nothing requeues it."""
    task = Process(run, "local-7", 0, 0, 1, 0, 1, "127.0.0.1", on_slurm=False)
    assert end(task, code, "", signal.SIGTERM) == (event == "failed")
    assert [row["event"] for row in events(run)] == [event] and events(run)[0]["why"] == "asked to stop (SIGTERM)"


def test_order_of_logs(run):
    """The log of the process that failed first comes first."""
    record_event(run, "failed", job="7", rank=2)
    for rank in (0, 1, 2, 10):
        (run / "slurm" / f"7_{rank}_log.out").write_text(f"rank {rank}\n")
    assert [file.name for file in status.log_files(run, "7")] == [f"7_{rank}_log.out" for rank in (2, 0, 1, 10)]
    assert status.tail(status.log_files(run, "7")[0]) == ["rank 2"]


def test_print_from(tmp_path, capsys):
    """A log is printed as it grows: a character whose bytes are still coming waits, a bar's steps are lines."""
    log = tmp_path / "0_log.out"
    assert print_from(log, 0) == 0
    log.write_bytes("10 %\r20 %\r\n\x1b[2JB\u00f6".encode()[:-1])
    place = print_from(log, 0)
    assert capsys.readouterr().out == "10 %\n20 %\n?[2JB"
    with log.open("ab") as file:
        file.write("\u00f6".encode()[-1:] + b"ck\n")
    assert print_from(log, place) == log.stat().st_size and capsys.readouterr().out == "\u00f6ck\n"


def test_last_error():
    """The last line that names an error is reported."""
    lines = ["Traceback (most recent call last):", "ValueError: no", "  at the end", "", "torch says goodbye"]
    assert last_error(lines) == "ValueError: no"
    assert last_error(["defend.py: error: no such class", "x"]) == "defend.py: error: no such class"
    assert last_error(["only this", " "]) == "only this" and last_error([]) == ""
    assert last_error(["features: 600 of 1000 images"], was_killed=True) == ""


def test_time_left():
    """Time left is computed from StartTime and TimeLimit: cancelling a job sets EndTime to now."""
    start = "2020-01-01T00:00:00"
    left = seconds_left({"StartTime": start, "TimeLimit": "1-02:03:04", "EndTime": start})
    more = seconds_left({"StartTime": start, "TimeLimit": "1-02:03:05", "EndTime": start})
    assert left < 0 and more - left == pytest.approx(1, abs=0.5)
    assert seconds_left({"StartTime": start, "TimeLimit": "UNLIMITED"}) is None and seconds_left({}) is None


def test_release_where_nobody_holds(run):
    """Releasing a run whose owner file is missing or invalid JSON does nothing, silently."""
    RunLock(run, "1").release()
    (run / "slurm" / "owner.json").write_text("{")
    RunLock(run, "1").release()
    assert (run / "slurm" / "owner.json").read_text() == "{"


def test_broken_bytes_in_history(run):
    """A byte that is no UTF-8 spoils neither its own row nor the next."""
    (run / "events.jsonl").write_bytes(b'{"event": "started", "host": "\xff"}\n{"event": "requeued"}\n')
    assert [row["event"] for row in events(run)] == ["started", "requeued"]


def test_all_attempts_idle():
    """If no attempt has made progress, all count as idle; before the first, none does."""
    history = [{"event": "started", "job": "1", "at": ""}] * 3
    assert idle_attempts(history, "1", "") == 3 and idle_attempts(history, "2", "") == 0


def test_job_file_is_readable(tmp_path):
    """Non-ASCII letters are not escaped in job.json, so that people can read it."""
    JobSpec("recipe.py", ("--known", "Gebäck"), "/", Cluster(), "logs").write(tmp_path)
    assert '"Gebäck"' in (tmp_path / "slurm" / "job.json").read_text()
