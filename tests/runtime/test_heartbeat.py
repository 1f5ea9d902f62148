"""A rank that dies or hangs is named, and the others end in time."""

import signal
import socket
import time

import pytest

from bigtrain.runtime.exit_codes import LOST
from tests.launching import start

SCRIPT = """
import os, signal, sys, time, torch
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.heartbeat import Heartbeat
from bigtrain.runtime.start import start

mode = sys.argv[1]
with user_errors("recipe.py"):
    accelerator = start("fp32")
    rank = accelerator.process_index
    hang_s, silent_s = {"pause": (60.0, 3.0), "loop": (6.0, 60.0)}.get(mode, (6.0, 3.0))
    heartbeat = Heartbeat(accelerator, hang_s, silent_s=silent_s, beat_s=0.3)
    for number in range(3):
        heartbeat.mark(f"was done with {number}")
        accelerator.wait_for_everyone()
    open(f"ready{rank}", "w").close()
    if rank == 1 and mode in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, mode))
    if rank == 1 and mode == "loop":
        while True:
            time.sleep(0.1)
    if rank == 1 and mode == "bug":
        raise ZeroDivisionError("one divided by nothing")
    if rank == 1 and mode == "mistake":
        raise ValueError("a mistake of one rank.")
    if rank == 0 and mode in ("first SIGKILL", "first SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, mode.split()[1]))
    if mode == "all":
        raise ValueError("a mistake of all.")
    if mode == "pause":
        time.sleep(10)
    heartbeat.mark("met the others")
    accelerator.reduce(torch.ones(1))
"""


def started(folder, mode, processes=2):
    (folder / "script.py").write_text(SCRIPT)
    return start(folder / "script.py", mode, processes=processes, folder=folder).ranks


def ended(processes, limit_s=90):
    codes = [process.wait(limit_s) for process in processes]
    return codes, [process.said("err") for process in processes]


@pytest.mark.parametrize(
    ("mode", "codes", "says"),
    [
        ("SIGKILL", [LOST, -signal.SIGKILL], "rank 1 (process {1} on {host}) is no longer alive"),
        ("loop", [LOST, LOST], "waiting for rank 1 (process {1} on {host}), which last was done with 2"),
        ("bug", [LOST, 1], "rank 1 (process {1} on {host}) has failed: ZeroDivisionError: one divided by nothing"),
        ("mistake", [LOST, 2], "rank 1 (process {1} on {host}) has failed: ValueError: a mistake of one rank."),
    ],
)
def test_lost_rank(tmp_path, mode, codes, says):
    """The other rank ends in time and names the one that died, failed or hangs."""
    processes = started(tmp_path, mode)
    found, said = ended(processes)
    assert found == codes, said
    sentences = [row for row in said[0].splitlines() if "error: " in row]
    assert len(sentences) == 1, said[0]
    assert says.format(*(p.pid for p in processes), host=socket.gethostname()) in sentences[0]
    assert "the same command continues from the newest checkpoint" in sentences[0]
    if mode == "loop":
        assert "script.py" in said[1], "the rank that hangs shows where"


def test_first_rank_killed(tmp_path):
    """The first rank, which serves the others, is named when it dies."""
    processes = started(tmp_path, "first SIGKILL")
    codes, said = ended(processes)
    assert codes == [-signal.SIGKILL, LOST]
    assert f"rank 0 (process {processes[0].pid} on " in said[1] and "has ended" in said[1]


def test_first_rank_frozen(tmp_path):
    """The first rank is named when it is frozen, too."""
    first, second = started(tmp_path, "first SIGSTOP")
    codes, said = ended([second])
    first.kill()
    first.wait()
    assert codes == [LOST] and f"rank 0 (process {first.pid} on {socket.gethostname()}) does not answer" in said[0]


def test_three_ranks(tmp_path):
    """Of three ranks, both others end and every error they print names the one that was killed."""
    processes = started(tmp_path, "SIGKILL", processes=3)
    codes, said = ended(processes)
    assert codes == [LOST, -signal.SIGKILL, LOST]
    named = f"rank 1 (process {processes[1].pid} on {socket.gethostname()}) is no longer alive"
    sentences = [row for text in said for row in text.splitlines() if "error: " in row]
    assert sentences and all(named in row for row in sentences), said


def test_frozen_rank(tmp_path):
    """A frozen rank is named, and the run ends without it."""
    first, second = started(tmp_path, "SIGSTOP")
    codes, said = ended([first])
    second.kill()
    second.wait()
    assert codes == [LOST] and f"rank 1 (process {second.pid}" in said[0]


def test_pause_of_all(tmp_path):
    """Pausing all ranks is not mistaken for a death, and a clean exit prints no error."""
    processes = started(tmp_path, "pause")
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(5)  # longer than a rank may be silent
    for process in processes:
        process.send_signal(signal.SIGCONT)
    codes, said = ended(processes)
    assert codes == [0, 0] and not any("error" in text for text in said), said


def test_mistake_of_all(tmp_path):
    """A user error on all ranks keeps its exit code."""
    codes, said = ended(started(tmp_path, "all"))
    assert codes == [2, 2] and "a mistake of all." in said[0]
