"""The processes that read for a run: they ignore its signals, end with it, and are reported when killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bigtrain.data.stream import Stream
from bigtrain.data.views import Resized
from tests.processes import Family


@pytest.fixture
def pictures(write_set, noise):
    return write_set([(["a"], noise(i)) for i in range(20)])


def stream(pictures, transform, workers):
    return Stream(pictures, pictures.plan(np.arange(len(pictures)), 6), transform, workers=workers)


class Deadly(Resized):
    """Ends the worker that uses it, as the kernel does when memory runs out."""

    def __call__(self, picture, rng):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker(pictures):
    """A worker that is killed stops the run with a sentence that says so."""
    with pytest.raises(OSError, match=r"a process that reads .* was it killed.* Or did it never start"):
        list(stream(pictures, Deadly(8), workers=1).batches())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_killed_with_queue(pictures, number):
    """A worker that is killed while batches wait in its queue stops the run with a clear error, too."""
    others = multiprocessing.active_children()
    batches = stream(pictures, Resized(8), workers=2).batches(epochs=None)
    next(batches)
    first = next(child for child in multiprocessing.active_children() if child not in others)
    time.sleep(0.5)  # the queue fills
    os.kill(first.pid, number)
    with pytest.raises(OSError, match="was it killed, or out of memory"):
        for _ in range(1000):
            next(batches)


def test_signals_spare_workers(pictures, tmp_path):
    """Signals that ask the run to stop do not end its workers."""
    script = tmp_path / "run.py"
    script.write_text(
        """
import os, signal, sys, time
import numpy as np
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.data.views import Resized

if __name__ == "__main__":
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: asked.append(number))
    pictures = ShardSet(sys.argv[1])
    batches = Stream(pictures, pictures.plan(np.arange(len(pictures)), 6), Resized(8), workers=2).batches(epochs=None)
    print(len(next(batches).sample_B), flush=True)
    while len(asked) < 4:
        next(batches)
    for _ in range(200):
        next(batches)
    batches.close()
"""
    )
    command = [sys.executable, script, pictures.url]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"6\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.killpg(run.pid, number)
        _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said.decode()


class Stuck(Resized):
    """Waits forever, as a read of a dead network disk does."""

    def __call__(self, picture, rng):
        time.sleep(1000)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stuck_worker(pictures, tmp_path, number):
    """A stuck worker ends with its run."""
    script = tmp_path / "run.py"
    script.write_text(
        f"""
import signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
import numpy as np
from test_workers import Stuck
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without
    pictures = ShardSet(sys.argv[1])
    stream = Stream(pictures, pictures.plan(np.arange(len(pictures)), 6), Stuck(8), workers=2)
    print("begins", flush=True)
    next(stream.batches())
"""
    )
    family = Family()
    command = [sys.executable, script, pictures.url]
    run = subprocess.Popen(command, env=family.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline() == b"begins\n"
    deadline = time.monotonic() + 60
    while len(family.alive()) < 5 and time.monotonic() < deadline:  # run, tracker, server, two workers
        time.sleep(0.1)
    time.sleep(2)
    run.send_signal(number)
    run.wait(60)
    assert not family.left_after(60)
