"""Items prepared by a thread while others are used."""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterable
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.2
LONGEST_S = 5.0  # that the end waits for an item that is being made: what makes it may be stuck for ever


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def ahead(items: Iterable[T], depth: int) -> Generator[T]:
    """The same items, of which a thread makes up to `depth` in advance; its errors are raised here."""
    made: queue.Queue[T | _Failed | None] = queue.Queue(depth)
    is_over = Event()

    def put(item: T | _Failed | None) -> bool:
        while not is_over.is_set():
            try:
                made.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(None)
        except BaseException as error:  # raised again where the items are used
            put(_Failed(error))

    thread = Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        is_over.set()
        thread.join(LONGEST_S)
