"""The processes that read and decode for a run: how they start, which signals they ignore, when they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, queues, resource_tracker

from bigtrain.data.memory import keep_freed_memory

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


def worker_context(*preload: str) -> multiprocessing.context.BaseContext:
    """Workers are forked from a server that has imported `preload` once, and holds neither threads nor a GPU.

    A signal that asks the run to stop may reach every process of a terminal or a job. The run needs its workers until
    it has saved, so they, their server and what cleans up behind them are started with these signals blocked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # it unblocks some of them when it starts, so it comes first
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def prepare_workers(workers: int) -> None:
    """Start their server before anything slow is done here, so that it imports torch meanwhile.

    Each worker also imports the script that was started, as Python's `multiprocessing` has it: a script whose imports
    are cheap costs it nothing.
    """
    if workers:
        worker_context("bigtrain.data.stream")


def end_with_lost_batch(error: Exception, batch: object) -> None:
    """End this worker when a batch cannot be handed over: python's queue would lose it, and the run wait for ever."""
    print(f"a process that reads cannot hand over its batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def start_worker(worker: int) -> None:
    """Called in each worker: it ends when the process that it reads for says so, or has ended."""
    keep_freed_memory()
    queues.Queue._on_queue_feeder_error = staticmethod(end_with_lost_batch)  # type: ignore[attr-defined]
    trainer = multiprocessing.parent_process()
    if trainer is None:
        return

    def end_when_told() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (trainer.pid, 0):
            pass
        os._exit(0)

    def end_after_it() -> None:
        trainer.join()
        os._exit(1)

    for watch in (end_when_told, end_after_it):
        threading.Thread(target=watch, daemon=True).start()
