"""The processes of one job: the environment of each, and which one decides the outcome; on a fake SLURM."""

import json
import signal

import pytest

from slurm.attempt_end import end
from slurm.process import MEETING_S, Process, publish_port, wait_for_port
from slurm.run_record import record_event
from tests.slurm.cluster_commands import (
    COUNTING,
    events,
    in_attempt,
    slurm,
    status,
    told,
)


def test_what_a_process_finds_around_it(submit, run, scheduler):
    """Each process of a job gets its rank, the world size, the rendezvous address, its threads and its strategy."""
    options = ["--nodes", 2, "--tasks-per-node", 2, "--cpus-per-task", 3, "--strategy", "zero2"]
    job = submit("--holds", 1, options=options)
    scheduler.when(in_attempt(run, 1), lambda: (scheduler.live(job, rank=3), scheduler.send(signal.SIGUSR2)))
    (run / "starts-3").write_text("x")  # so that it does not hold
    scheduler.run()
    first, last = (json.loads((run / f"around-{rank}.json").read_text()) for rank in (0, 3))
    port = json.loads((run / "slurm" / "meeting.json").read_text())["port"]
    assert first == {
        "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "3", "BIGTRAIN_LAUNCHED": "1",
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    }  # fmt: skip
    assert {**last, "MASTER_PORT": ""} == {**first, "RANK": "3", "LOCAL_RANK": "1", "MASTER_PORT": ""}
    assert [row["processes"] for row in events(run) if row["event"] == "started"] == [4, 4]


def test_one_process_is_alone(submit, run, scheduler):
    submit()
    scheduler.run()
    around = json.loads((run / "around-0.json").read_text())
    assert around == {"OMP_NUM_THREADS": "1", "BIGTRAIN_LAUNCHED": "1"}


@pytest.mark.parametrize("flags", [(), ("--deaf",)], ids=["listens", "does_not_listen"])
def test_another_rank_fails(submit, run, scheduler, flags):
    """Where one rank fails, the recipes of the others are ended, and status says the error of that one."""
    job, wrong = submit("--holds", 1, *flags, "--ends", 1, "--ends-rank", 1, options=["--nodes", 2]), []
    scheduler.when(in_attempt(run, 1), lambda: wrong.append(scheduler.live(job, rank=1)))
    scheduler.run()
    assert wrong == ["FAILED"] and told(run) == ["submitted", "started", "failed"]
    assert scheduler.jobs[job].state == "FAILED" and ("scontrol", "requeue", job) not in scheduler.asked
    assert status(run)[2].startswith("ValueError: it does not add up (rank 1 on ")
    assert scheduler.children[0].returncode == (-9 if flags else 85)
    assert "ValueError" in slurm("logs", run)


@pytest.fixture
def ranks(run, scheduler):
    """Tasks of one attempt of a job of three processes that runs."""
    slurm("submit", COUNTING, "--nodes", 3, "--", "--out", run)
    job = scheduler.jobs["7"]
    job.state, job.started = "RUNNING", scheduler.clock.now
    record_event(run, "started", job="7", restarts=0, at="")
    return [Process(run, "7", 0, rank, 3, 0, 1, "node1", on_slurm=True) for rank in range(3)]


def test_another_rank_decides(ranks, run, scheduler):
    """If rank 0 has died without deciding, the next rank requeues the job, once."""
    began = scheduler.clock.now
    assert [end(task, 86, "", None) for task in ranks[1:]] == [0, 0]
    assert scheduler.clock.now - began > 30
    assert told(run)[2:] == ["requeued"] and scheduler.asked.count(("scontrol", "requeue", "7")) == 1


@pytest.mark.parametrize("code", [86, -9])
def test_rank_0_decides(ranks, run, scheduler, code):
    """Once rank 0 has recorded the outcome of the job, the others record nothing."""
    assert [end(task, code, "", None) for task in ranks] == [0, 0, 0]
    assert told(run)[2:] == ["requeued"] and scheduler.asked.count(("scontrol", "requeue", "7")) == 1


def test_first_failure_counts(ranks, run, scheduler):
    """The error of the first rank to fail is the one recorded: the others fail or are lost because of it."""
    codes = [end(ranks[2], 1, "ValueError: no", None), end(ranks[1], 2, "connection closed", None)]
    codes += [end(ranks[0], 86, "", None)]
    assert codes == [1, 2, 2] and [row["error"] for row in events(run) if row["event"] == "failed"] == [
        "ValueError: no"
    ]
    assert told(run)[2:] == ["failed"] and ("scontrol", "requeue", "7") not in scheduler.asked


def test_where_ranks_meet(ranks, run, scheduler):
    """Other ranks wait for the port that rank 0 publishes in this attempt, and time out with an error message."""
    publish_port(Process(run, "7", -1, 0, 3, 0, 1, "node1", on_slurm=True), 1)  # of the attempt before
    scheduler.when(lambda: scheduler.clock.now > began + 20, lambda: publish_port(ranks[0], 1234))
    began = scheduler.clock.now
    assert wait_for_port(ranks[1]) == 1234 and 20 < scheduler.clock.now - began < 25
    with pytest.raises(ValueError, match=rf"rank 1 heard nothing from rank 0 in .*meeting.json for {MEETING_S} s"):
        wait_for_port(Process(run, "7", 1, 1, 3, 0, 1, "node1", on_slurm=True))
