"""Processes of one run that differ: in their settings, in what they find, in how far they get."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigtrain.runtime.exit_codes import LOST
from bigtrain.runtime.ports import free_port
from tests.launching import ENVIRONMENT, ROOT, Forked


def bare(script, *flags_of_rank):
    """Processes as a scheduler starts them, each on a machine of its own, with flags of its own."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(flags_of_rank))}
    return [
        Forked(
            list(map(str, [ROOT / "recipes" / script, *flags])),
            {**ENVIRONMENT, **shared, "RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank, flags in enumerate(flags_of_rank)
    ]


def ended(processes):
    codes = [process.wait() for process in processes]
    return codes, [process.said("err") for process in processes]


@pytest.mark.parametrize(
    ("setting", "values"), [("distil-lr", ("0.001", "0.05")), ("seed", ("0", "1")), ("log-every", ("1", "2"))]
)
def test_different_settings(small, tmp_path, setting, values):
    """Ranks with different settings are refused, and all of them say which."""
    flags = [[*small, f"--{setting}", value, "--out", tmp_path / "run"] for value in values]
    codes, said = ended(bare("defend.py", *flags))
    assert codes == [2, 2]
    pair = f"rank 1 have different settings: {setting.replace('-', '_')} ({values[0]} and {values[1]})"
    assert all(pair in text for text in said), said
    assert not (tmp_path / "run").exists()


def test_fails_before_they_meet(small, tmp_path):
    """A rank that fails before the rendezvous says so, and the rank waiting for it ends at Ctrl-C."""
    flags = [*small, "--out", tmp_path / "run"]
    first, second = bare("defend.py", flags, [*flags, "--train", tmp_path / "nowhere"])
    code, said = second.wait(), second.said("err")
    assert code == 2 and f"error (rank 1 on {socket.gethostname()}): " in said and "nowhere" in said
    time.sleep(3)
    assert first.poll() is None  # it waits for the other
    first.send_signal(signal.SIGINT)
    assert ended([first])[0] == [-signal.SIGINT]


def test_port_in_use(small, tmp_path):
    """Where another program listens at the port, rank 0 says so in a sentence."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        around = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        first = Forked(
            list(map(str, [ROOT / "recipes" / "defend.py", *small, "--out", tmp_path / "run"])),
            {**around, "RANK": "0", "LOCAL_RANK": "0"},
        )
        (code,), (said,) = ended([first])
    assert code == 2 and said.count("error") == 1 and f"another program listens at 127.0.0.1:{port}" in said, said


HANGS = """
import sys, time
import torch.nn.functional as F
from recipes import pretrain

taken, cross_entropy = 0, F.cross_entropy

def hanging(*arguments, **options):
    global taken
    taken += 1
    while taken == 3 and rank == "1":
        time.sleep(0.1)
    return cross_entropy(*arguments, **options)

F.cross_entropy, rank = hanging, sys.argv.pop(1)
pretrain.main(sys.argv[1:])
"""


def test_hanging_rank(shards, tmp_path):
    """A rank that hangs inside its step is named alone, and shows where it hangs."""
    script = tmp_path / "script.py"
    script.write_text(HANGS)
    size = "--model vit_tiny_patch16_224 --image-size 32 --patch-size 8 --depth 1 --hang-timeout-min 0.1"
    flags = [*size.split(), "--train", shards / "test", "--epochs", "1", "--batch", "100", "--out", tmp_path / "run"]
    processes = bare(script, *([rank, *flags] for rank in "01"))
    codes, said = ended(processes)
    assert codes == [LOST, LOST], said
    (sentence,) = [row for row in said[0].splitlines() if "error: " in row]
    assert f"waiting for rank 1 (process {processes[1].pid} on {socket.gethostname()}), which last got" in sentence
    assert "rank 0 (" not in sentence and "hanging" in said[1]  # where it hangs


WAITS = """
import sys, time
from pathlib import Path
from bigtrain.runtime.exit import user_errors

with user_errors("script.py"):
    Path(sys.argv[1]).write_text("here")
    time.sleep(60)
"""


def test_killed_launcher(tmp_path):
    """A launcher that is killed before training begins leaves no process."""
    script, here = tmp_path / "script.py", tmp_path / "here"
    script.write_text(WAITS)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script, here]
    launcher = subprocess.Popen(list(map(str, launch)), env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not here.exists() and time.monotonic() < until:
        time.sleep(0.05)
    (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    while Path("/proc", child).exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert time.monotonic() < until
