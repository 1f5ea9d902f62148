"""Recipes and scripts as processes of a test: forked from a server (fast), or started as a user starts them.

    done = run("defend.py", *flags, processes=2)            # forked, over gloo
    done = run("defend.py", *flags, config="zero2", processes=2)
    process = start("defend.py", *flags); process.kill()
    subprocess.run(command("defend.py", *flags), env=ENVIRONMENT)      # what is about the start of a process
    subprocess.run(accelerate("ddp", 2, *flags), env=ENVIRONMENT)      # ... or about a launcher

A forked process runs the same file with the same arguments, environment and streams, gets the same signals, and
has imported at least what a new one would have by then. Real starts are for launchers, for what looks for a command
line in /proc, and for CUDA.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from unittest import mock

from bigtrain.runtime.ports import free_port

ROOT = Path(__file__).parents[1]
ON_GPU = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
ON_GPU |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT = {**ON_GPU, "CUDA_VISIBLE_DEVICES": ""}  # bitwise and 1e-5 comparisons hold on CPUs only
LIMIT_S = 600.0  # for one start; the limit of a test (pytest-timeout) mostly comes first
GRACE_S = 90.0  # longer than a rank takes to notice that another has ended or hangs


def command(recipe, *flags):
    """`python recipes/X.py`, or of a script elsewhere."""
    return list(map(str, [sys.executable, ROOT / "recipes" / recipe, *flags]))


def accelerate(config, processes, *flags, recipe="defend.py"):
    """The command that launches a recipe with a configuration of recipes/accelerate; run it in ENVIRONMENT."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    launch += ["--config_file", ROOT / "recipes" / "accelerate" / f"{config}.yaml", "--num_processes", processes]
    return list(map(str, [*launch, ROOT / "recipes" / recipe, *flags]))


def run(recipe, *flags, processes=1, config="", environment=ENVIRONMENT, folder=None, limit_s=LIMIT_S):
    """Run a recipe (or the script at an absolute path) to its end; with several processes over gloo.

    Args:
        config: of recipes/accelerate, whose environment the processes get.

    Returns:
        A `subprocess.CompletedProcess`: the output of all ranks, and the first exit code that is not 0.
    """
    started = start(recipe, *flags, processes=processes, config=config, environment=environment, folder=folder)
    return started.result(limit_s)


def start(recipe, *flags, processes=1, config="", environment=ENVIRONMENT, folder=None, own_session=False):
    """The same, without waiting for its end."""
    environment = environment_of(config, processes, environment) if config else environment
    ranks = [{}]
    if processes > 1 or "zero" in config:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    line = list(map(str, [ROOT / "recipes" / recipe, *flags]))
    where = folder or Path.cwd()
    return Started([Forked(line, {**environment, **rank}, where, own_session) for rank in ranks])


class Started:
    """The processes of one start."""

    def __init__(self, ranks):
        self.ranks = ranks

    def poll(self):
        """None while any of them lives; then the first exit code that is not 0."""
        codes = [rank.poll() for rank in self.ranks]
        return None if None in codes else next(filter(None, codes), 0)

    def result(self, limit_s=LIMIT_S):
        """Wait for their end; none may go on for GRACE_S after one has failed."""
        until, living = time.monotonic() + limit_s, self.ranks
        with told_what_they_said(self.ranks):
            while living := [rank for rank in living if rank.poll() is None]:
                if any(rank.returncode for rank in self.ranks):
                    until = min(until, time.monotonic() + GRACE_S)
                if not select.select(living, [], [], max(until - time.monotonic(), 0))[0]:
                    raise TimeoutError(f"{len(living)} of {len(self.ranks)} processes have not ended")
        out, err = ("".join(rank.said(stream) for rank in self.ranks) for stream in ("out", "err"))
        return subprocess.CompletedProcess(self.ranks[0].line, self.poll(), out, err)

    def send_signal(self, number):
        for rank in self.ranks:
            rank.send_signal(number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def told_what_they_said(ranks):
    """If a wait raises (pytest-timeout included), print what the processes wrote to stderr, and kill them."""
    try:
        yield
    except BaseException:
        for rank in ranks:
            print(f"{' '.join(rank.line)}: {rank.poll()}: {rank.said('err')[-3000:]}", file=sys.stderr)
            rank.kill()
        raise


class Forked:
    """One process, forked from the server of this test worker."""

    def __init__(self, line, environment, folder=ROOT, own_session=False):
        self.line, self.returncode = line, None
        self._files = {name: tempfile.TemporaryFile("w+") for name in ("out", "err")}  # noqa: SIM115 (read at the end)
        self._status, status = os.pipe()
        request = {
            "line": line, "environment": environment, "folder": str(folder),
            "own_session": own_session,
        }  # fmt: skip
        try:
            handles = [file.fileno() for file in self._files.values()]
            self.pid = server().fork(request, [*handles, status])
        finally:
            os.close(status)

    def fileno(self):
        """Something to read once it has ended."""
        return self._status

    def poll(self):
        if self.returncode is None and select.select([self], [], [], 0)[0]:
            status = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = int(status) if status else -signal.SIGKILL  # nothing: its server was killed
        return self.returncode

    def wait(self, limit_s=LIMIT_S):
        with told_what_they_said([self]):
            if self.poll() is None and not select.select([self], [], [], limit_s)[0]:
                raise TimeoutError("the process has not ended")
        return self.poll()

    def said(self, stream):
        """What it has written so far; read in place, for the process shares the file's position."""
        number = self._files[stream].fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace")

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __del__(self):
        if self.returncode is None:
            self.kill()


class Server:
    def __init__(self):
        self.socket, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
            cwd=ROOT, env=ENVIRONMENT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._replies = self.socket.makefile()
        atexit.register(self.close)

    def fork(self, request, handles):
        text = json.dumps(request).encode()
        socket.send_fds(self.socket, [text], handles)
        reply = self._replies.readline()
        if not reply:
            raise RuntimeError(f"the fork server has ended with code {self.process.wait()}: see its output")
        return int(reply)

    def close(self):
        self._replies.close()
        self.socket.close()
        self.process.wait()


@lru_cache(maxsize=1)
def server():
    """Of this test worker, started when it is first needed."""
    return Server()


def environment_of(config, processes, environment):
    """What `accelerate launch` adds to the environment of its processes for a file of recipes/accelerate."""
    from accelerate.commands import launch

    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    arguments = ["--config_file", str(file), "--num_processes", str(processes)]
    arguments += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", "script.py"]
    with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):  # not what a test has set for its own process
        given, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
        if given.use_deepspeed:
            given.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            _, made = launch.prepare_deepspeed_cmd_env(given)
        elif given.multi_gpu:
            made = launch.prepare_multi_gpu_env(given)
        else:
            _, made = launch.prepare_simple_launcher_cmd_env(given)
    return {**{k: v for k, v in made.items() if k.startswith("ACCELERATE_")}, **environment}
