"""Work on many shards, in this process or in a pool, with results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar

Work = TypeVar("Work")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Done(Generic[Answer]):
    """A result that an earlier run left."""

    answer: Answer


def in_order(
    do: Callable[[Work], Answer], work: Iterable[Work | Done[Answer]], workers: int
) -> Iterator[tuple[Answer, bool]]:
    """The answers in the order of the work, and whether each is new; at most 2 * workers of them wait."""
    if workers <= 1:
        for piece in work:
            yield (piece.answer, False) if isinstance(piece, Done) else (do(piece), True)
        return
    waiting: deque[Done[Answer] | Future[Answer]] = deque()
    # workers are forked from a server without threads that has imported what they need
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", do.__module__])
    pool = ProcessPoolExecutor(workers, context, worker_start, (dict(os.environ),))
    try:
        for piece in work:
            waiting.append(piece if isinstance(piece, Done) else pool.submit(do, piece))
            if len(waiting) > 2 * workers:
                yield first_of(waiting)
        while waiting:
            yield first_of(waiting)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed (out of memory?): run the same command again with fewer --workers; "
            "a build continues where it stopped."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def first_of(waiting: deque[Done[Answer] | Future[Answer]]) -> tuple[Answer, bool]:
    first = waiting.popleft()
    return (first.answer, False) if isinstance(first, Done) else (first.result(), True)


def worker_start(environment: dict[str, str]) -> None:
    """A worker ignores Ctrl-C, which its parent handles, and exits when its parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)  # credentials, say, that are newer than the server

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
