"""From prepared runs to jobs: one by one, or as arrays that wait for others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain.text import counted
from slurm import scheduler
from slurm.attempt import Attempt
from slurm.cluster import Cluster
from slurm.prepare_run import forget
from slurm.run_record import events, record_event


def submit(runs: Sequence[Path], cluster: Cluster, logs: Path, name: str, **further: Any) -> list[str]:
    """Give prepared runs to the scheduler: one as a job, more as an array. Their job ids.

    Raises:
        ValueError: it refuses.
    """
    logs.mkdir(parents=True, exist_ok=True)
    try:
        job_ids = scheduler.queue([Attempt(str(run)) for run in runs], cluster, logs, name, **further)
    except ValueError:
        for run in runs:
            if not events(run):
                forget(run)
        raise
    for run, job_id in zip(runs, job_ids, strict=True):
        record_event(run, "submitted", job=job_id)
    return job_ids


def submit_arrays(
    runs: Sequence[Path], cluster: Cluster, logs: Path, name: str, parallel: int, wait_for: Sequence[str]
) -> list[str]:
    """Runs as one array, or several in sequence where SLURM limits their size; the ids of the arrays."""
    largest = scheduler.largest_array() if len(runs) > 1 else 1
    ids: list[str] = []
    for first in range(0, len(runs), largest):
        after = ids[-1:] or sorted({job.split("_")[0] for job in wait_for})
        some = submit(runs[first : first + largest], cluster, logs, name, parallel=parallel, after=after)
        ids.append(some[0].split("_")[0])
        behind = f", after {' '.join(after)}" if after else ""
        print(f"job {ids[-1]}: {counted(len(some), 'run')}{behind}", flush=True)
    return ids
