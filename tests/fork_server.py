"""A process that has imported torch and what the recipes use, and forks itself for each script that a test runs.

`launching.py` starts one for each test worker, when it is first needed. It has no CUDA, one thread and no process
group, so a fork is what a new process would be by then, 5 CPU seconds earlier.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback

PRELOADED = (
    "torch._dynamo",  # an optimizer imports it
    "bigtrain.detectors.network_detector",
    "bigtrain.methods.defend.detector",
    "bigtrain.evaluation.judge",
    "recipes.defend",
    "bigtrain.training.feature_cache",
    "bigtrain.training.stage",
    "bigtrain.training.trunk",
    "sklearn.neighbors",
    "torch.utils.tensorboard",
    "tyro",
)
OF_DEEPSPEED = ("deepspeed", "deepspeed.runtime.zero.muon.original_muon")  # the latter imports torch's compiler
SIGNALS = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def serve(requests: socket.socket) -> None:
    """Fork for each request until the other end is closed; the exit status of each child goes into its own pipe."""
    for name in PRELOADED:
        importlib.import_module(name)
    status_of: dict[int, int] = {}  # process -> where its status goes
    wakes, wakes_write = os.pipe()
    for end in (wakes, wakes_write):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes_write)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for pytest, which then closes its end
    while True:
        readable, _, _ = select.select([requests, wakes], [], [])
        if wakes in readable:
            os.read(wakes, 4096)
            report_the_dead(status_of)
        if requests in readable:
            text, handles, _, _ = socket.recv_fds(requests, 1 << 20, 3)
            if not text:
                return
            request = json.loads(text)
            if request["environment"].get("ACCELERATE_USE_DEEPSPEED") == "true":
                for name in OF_DEEPSPEED:
                    importlib.import_module(name)
            *streams, status = handles
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for handle in (requests.detach(), wakes, wakes_write, status, *status_of.values()):
                    os.close(handle)
                run(request, streams)
            for handle in streams:
                os.close(handle)
            status_of[pid] = status
            requests.sendall(f"{pid}\n".encode())


def report_the_dead(status_of: dict[int, int]) -> None:
    while status_of:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        handle = status_of.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(handle, str(os.waitstatus_to_exitcode(status)).encode())
        os.close(handle)


def run(request: dict, streams: list[int]) -> None:
    """Behave like `python SCRIPT ARGUMENTS` in this process, and exit as it would."""
    if request["own_session"]:
        os.setsid()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, handle in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(handle, place)
        os.close(handle)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["line"]
    code = 1
    try:
        runpy.run_path(request["line"][0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    for end in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            end()
    os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
