"""The same jobs on this machine, without SLURM; and a recipe in this process, for a debugger."""

from __future__ import annotations

import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import submitit

from slurm.attempt import Attempt
from slurm.cluster import Cluster
from slurm.run_record import RESULTS_FILE, events, record_event
from slurm.status import print_from, progress

TELL_EVERY_S = 30.0
NO_LIMIT_MIN = 60 * 24 * 365


def run_here(runs: Sequence[Path], cluster: Cluster, logs: Path, *, at_once: int = 1, show: bool = False) -> int:
    """The same jobs on this machine, without SLURM, until they end; how many have not finished.

    Args:
        show: the log of a single run, as it grows.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, at_work, stopping = list(runs), dict[Path, Any](), [False]

    def stop(number: int, frame: FrameType | None) -> None:
        stopping[0] = True
        for job in at_work.values():
            if job._process:
                job._process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    shown, told = 0, time.monotonic()
    try:
        while at_work or (waiting and not stopping[0]):
            while waiting and len(at_work) < at_once and not stopping[0]:
                run = waiting.pop(0)
                made = submitit.LocalExecutor(logs)
                made.update_parameters(
                    tasks_per_node=cluster.processes, gpus_per_node=min(cluster.gpus_per_node, cluster.processes),
                    timeout_min=NO_LIMIT_MIN, stderr_to_stdout=True, setup=list(cluster.setup),
                )  # fmt: skip
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # so that submitit's own process outlives a Ctrl-C
                at_work[run] = made.submit(Attempt(str(run)))
                record_event(run, "submitted", job=f"local-{at_work[run].job_id}")
                if not show:
                    print(f"{run.name}: started, {len(waiting)} waiting; log: {at_work[run].paths.stdout}", flush=True)
                signal.signal(signal.SIGINT, stop)
                signal.signal(signal.SIGTERM, stop)
            time.sleep(0.2)
            if not show and time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                for run in at_work:
                    print(f"{run.name}: {progress(run) or 'starting'}", flush=True)
            for run, job in list(at_work.items()):
                ended = job._process is None or job._process.poll() is not None
                if show:
                    shown = print_from(job.paths.stdout, shown)
                if ended:
                    del at_work[run]
                    if not show:
                        print(f"{run.name}: {outcome(run)}  ({len(waiting)} waiting)", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return sum(not (run / RESULTS_FILE).is_file() for run in runs)


def outcome(run: Path) -> str:
    if (run / RESULTS_FILE).is_file():
        return "finished"
    last: dict[str, Any] = next(iter(reversed(events(run))), {})
    return f"{last.get('event', 'nothing')}: {last.get('error') or last.get('why') or ''}".rstrip(": ")


def run_in_this_process(recipe: Path, flags: Sequence[str]) -> None:
    """The recipe, for a debugger: no job around it."""
    sys.argv = [str(recipe), *flags]
    runpy.run_path(str(recipe), run_name="__main__")
