"""What runs on this machine: for tests of what outlives what."""

import contextlib
import os
import signal
import time
import uuid
from pathlib import Path

VARIABLE = "BIGTRAIN_TEST_FAMILY"


class Family:
    """All processes that descend from those started with `environment`, whatever sessions launchers put them in."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.environment = {**os.environ, VARIABLE: self.name}

    def alive(self) -> list[int]:
        found, entry = [], f"{VARIABLE}={self.name}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if entry in path.read_bytes().split(b"\0"):  # a zombie's is empty
                    found.append(int(path.parent.name))
        return sorted(found)

    def left_after(self, wait_s: float) -> list[int]:
        """Those that have not ended within so many seconds."""
        until = time.monotonic() + wait_s
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.05)
        return left

    def kill(self, number: int = signal.SIGKILL) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def left_in_session(session, wait_s):
    """The processes of a session that have not ended within so many seconds."""
    until = time.monotonic() + wait_s
    while (left := in_session(session)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def in_session(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(own_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found
