"""A rank that dies or hangs: the others notice, name it and exit, instead of waiting in a collective forever.

A thread of each rank reports once a second, to a store on rank 0, that the rank is alive and how much progress its main
thread has made. Rank 0 decides: a rank is *silent* when its reports stop (killed, frozen, cut off), and *hangs* when no
rank makes progress for long and it is the furthest behind, so that the others wait for it. All ranks then exit with
code LOST. The others watch whether rank 0's store answers. Which rank hangs inside of one collective cannot be known.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bigtrain.runtime.exit_codes import LOST

if TYPE_CHECKING:
    from accelerate import Accelerator

VERDICT = "verdict"
OF_COLLECTIVES = re.compile(r"connection|peer|gloo|nccl|timed out|timeout|process group", re.IGNORECASE)


class Heartbeat:
    """Watches the ranks of a run; created and closed by all of them. A single process needs none.

    Args:
        hang_s: after so long without progress of any rank, the one furthest behind counts as hanging.
        silent_s: must exceed how long the main thread may hold the GIL (loading, compiling).
    """

    current: Heartbeat | None = None

    def __init__(self, accelerator: Accelerator, hang_s: float, *, silent_s: float = 60.0, beat_s: float = 1.0) -> None:
        self.accelerator, self.hang_s, self.silent_s, self.beat_s = accelerator, hang_s, silent_s, beat_s
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.moves, self.doing, self.beats = 0, "started", 0
        self._seen: list[dict[str, Any]] = []
        self.verdict: str | None = None
        self._ends, self._explains, self._judged = threading.Event(), False, threading.Event()
        Heartbeat.current = self
        if self.ranks == 1:
            return
        from accelerate.utils import broadcast_object_list  # here: what ends a process imports this module
        from torch.distributed import TCPStore

        address, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=max(10.0, 10 * beat_s))
        port = [0]
        if self.rank == 0:
            self.store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            port = [self.store.port]
        broadcast_object_list(port)
        if self.rank != 0:
            self.store = TCPStore(address, port[0], is_master=False, timeout=timeout)
        self._beat()
        accelerator.wait_for_everyone()  # from here on every rank has a key to be read
        self._seen = self._read()
        self._first = self._seen[0]
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._thread.start()
        self._answered = time.monotonic()
        self._watch = threading.Thread(target=self._watch_first, name="watches rank 0", daemon=True)
        if self.rank != 0:
            self._watch.start()

    def mark(self, doing: str) -> None:
        """Report progress of the main thread, and what it did; equally often on each rank."""
        self.doing = doing
        self.moves += 1

    def close(self) -> None:
        """Stop watching, on all ranks."""
        if self._stop():
            self.accelerator.wait_for_everyone()  # rank 0's store outlives the others' threads

    def gone(self, reason: str) -> None:
        """Tell the others that this rank exits with an error; they may not have the error themselves."""
        if self._stop():
            with suppress(RuntimeError):  # rank 0 has ended before
                self.store.set(VERDICT, json.dumps([[self.rank], f"{self._named(self._own())} has failed: {reason}"]))
                self._linger()

    def explain(self, within_s: float = 20.0) -> str | None:
        """Why a collective has failed on this rank: a sentence that names the rank that has ended, if one has."""
        if self.ranks == 1 or not self._thread.is_alive():
            return self.verdict
        self._explains = not self._judged.is_set()
        if not self._explains:
            time.sleep(60)  # the thread says it, and ends this process
        self._judged.wait(within_s)
        self._linger()
        return self.verdict

    def _stop(self) -> bool:
        is_first = self.ranks > 1 and not self._ends.is_set()
        self._ends.set()
        if is_first:
            self._thread.join()
            if self.rank != 0:
                self._watch.join()  # a thread that wakes while the interpreter ends may abort it
        return is_first

    def _linger(self) -> None:
        """Let the others read what is in the store, which ends with rank 0."""
        time.sleep(2 * self.beat_s if self.rank == 0 else 0)

    def _own(self) -> dict[str, Any]:
        own = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        return own | {"beats": self.beats, "moves": self.moves, "doing": self.doing}

    def _beat(self) -> None:
        self.beats += 1
        self.store.set(str(self.rank), json.dumps(self._own()))

    def _read(self) -> list[dict[str, Any]]:
        """The last report of each rank, and when it last changed, by this rank's clock."""
        now, before = time.monotonic(), self._seen
        said = [json.loads(text) for text in self.store.multi_get([str(rank) for rank in range(self.ranks)])]
        for rank, one in enumerate(said):
            for what in ("beats", "moves"):
                is_new = not before or before[rank][what] != one[what]
                one[f"{what}_at"] = now if is_new else before[rank][f"{what}_at"]
        return said

    def _live(self) -> None:
        last = time.monotonic()
        while not self._ends.wait(self.beat_s):
            if time.monotonic() - last > min(5 * self.beat_s, self.silent_s / 2) and self.rank == 0:
                self._seen = []  # this rank was frozen itself, perhaps all were: ages start over
            last = self._answered = time.monotonic()
            try:
                self._beat()
                if self.rank == 0:
                    self._seen = self._read()
                    if verdict := self._judge():
                        self.store.set(VERDICT, json.dumps(verdict))
                if not self.store.check([VERDICT]):
                    continue
                accused, sentence = json.loads(self.store.get(VERDICT))
            except RuntimeError:  # of the store
                if self._ends.is_set():
                    return
                first = self._first
                accused, sentence = [0], f"{self._named(first)} has ended; it served the other processes"
            return self._end(accused, sentence)

    def _watch_first(self) -> None:
        """Exit where rank 0 is frozen or cut off: calls of the store then wait forever, whatever their timeout."""
        last = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(self.beat_s)
            now = time.monotonic()
            if now - last > min(5 * self.beat_s, self.silent_s / 2):
                self._answered = now  # it was this rank that was frozen
            last = now
            if now - self._answered > self.silent_s:
                self._end([0], f"{self._named(self._first)} does not answer")

    def _judge(self) -> tuple[list[int], str] | None:
        """The ranks at fault, if any, and why."""
        now = time.monotonic()
        bound_s = 5 * self.beat_s if self._explains else self.silent_s
        silent = [one for one in self._seen if now - one["beats_at"] > bound_s]
        if silent:
            return [one["rank"] for one in silent], f"{', '.join(map(self._named, silent))} is no longer alive"
        idle_s = now - max(one["moves_at"] for one in self._seen)
        if idle_s > self.hang_s:
            behind = min(one["moves"] for one in self._seen)
            hanging = [one for one in self._seen if one["moves"] == behind]
            names = "; ".join(f"{self._named(one)}, which last {one['doing']}" for one in hanging)
            return [one["rank"] for one in hanging], f"no progress for {idle_s:.0f} s, waiting for {names}"
        return None

    def _named(self, one: dict[str, Any]) -> str:
        return f"rank {one['rank']} (process {one['pid']} on {one['host']})"

    def _end(self, accused: list[int], sentence: str) -> None:
        self.verdict = f"{sentence}. All processes exit; the same command continues from the newest checkpoint."
        self._judged.set()
        if self._explains:
            return  # the main thread is awake, and says it
        speaker = next((rank for rank in range(self.ranks) if rank not in accused), 0)
        if self.rank in accused:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        if self.rank == speaker:
            print(f"error: {self.verdict}", file=sys.stderr, flush=True)
        self._linger()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST)  # the main thread may hang in a collective forever


def failed(error: BaseException) -> str | None:
    """Tell the other ranks of an error on this one. Where it is a collective's, because another rank has ended: the
    sentence that names that one."""
    if (heartbeat := Heartbeat.current) is None:
        return None
    if isinstance(error, RuntimeError) and OF_COLLECTIVES.search(str(error)) and (why := heartbeat.explain()):
        return why
    heartbeat.gone(f"{type(error).__name__}: {error}".splitlines()[0][:300])
    return None
