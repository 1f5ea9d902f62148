"""Stopping: a signal or a file requests it, all ranks agree on it at a step boundary."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from accelerate import Accelerator
from torch import Tensor

from bigtrain.data.later import on_device
from bigtrain.files import write_json
from bigtrain.runtime.exit import at_end
from bigtrain.runtime.exit_codes import INTERRUPTED, STOPPED
from bigtrain.runtime.run_folder import STOPPED_FILE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SAME_PRESS_S = 1.0  # a launcher passes the Ctrl-C on that the terminal has sent to this process too


class AskedWhileWaiting(BaseException):
    """The run was asked to stop while it waited for data."""


class Stop:
    """`stop.agreed()` is True on every rank at the same step, once any of them was asked to stop.

    Nothing is saved in a signal handler. A second Ctrl-C exits at once, from a thread: Python's handlers
    wait while the main thread is in a collective.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.file = accelerator, folder / "stop"
        self.asked, self._may_interrupt = False, False
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        numbers, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=leave_at_second_interrupt, args=(numbers,), name="interrupts", daemon=True).start()
        at_end.callback(self.release)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._may_interrupt:
            raise AskedWhileWaiting

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this process waits for data: a request to stop raises AskedWhileWaiting at once, where it is alone.
        With several, the others may be in a collective that needs this one."""
        self._may_interrupt = self.accelerator.num_processes == 1
        try:
            if self._may_interrupt and self.asked:  # since the step before
                raise AskedWhileWaiting
            yield
        finally:
            self._may_interrupt = False

    def agreed(self) -> bool:
        return int(self.sums([])[0]) > 0

    def sums(self, counts: Sequence[int]) -> list[int] | Tensor:
        """On how many ranks the run was asked to stop and, since the ranks talk anyway, the sums of their counts; of
        several ranks as a tensor, which may still be under way on its device."""
        own = [int(self.asked or self.file.exists()), *counts]
        if self.accelerator.num_processes == 1:
            return own
        return self.accelerator.reduce(on_device(own, self.accelerator.device), reduction="sum")

    def leave_if_asked(self) -> None:
        """Where there is nothing to save (while images are judged, say): call on all ranks, equally often on each."""
        if self.agreed():
            self.leave()

    def release(self) -> None:
        """Let signals end the process at once again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._wakes.fileno() >= 0:
            signal.set_wakeup_fd(-1)
            self._wakes.close()  # which ends the thread

    def leave(self, step: int = 0, stage: str = "") -> NoReturn:
        """Exit with the code of a stopped run; call on all ranks, after saving."""
        self.accelerator.wait_for_everyone()
        self.accelerator.print("stopped on request, saved; the same command continues.")
        if self.accelerator.is_main_process:
            self.file.unlink(missing_ok=True)
            record = {"stage": stage, "step": step, "time": time.time(), "exit_code": STOPPED}
            write_json(self.file.parent / STOPPED_FILE, record)
        raise SystemExit(STOPPED)


def leave_at_second_interrupt(numbers: socket.socket) -> None:
    """Read the signals that come in; end this process at the second Ctrl-C, which torchrun passes on as SIGTERM."""
    first_at: float | None = None
    seconds = (signal.SIGINT, signal.SIGTERM) if "TORCHELASTIC_RUN_ID" in os.environ else (signal.SIGINT,)
    with numbers:
        while received := numbers.recv(1):
            if first_at is None:
                first_at = time.monotonic() if received[0] == signal.SIGINT else None
            elif received[0] in seconds and time.monotonic() - first_at > SAME_PRESS_S:
                os.write(2, b"interrupted; the same command continues.\n")
                os._exit(INTERRUPTED)
