"""Pictures read and cut to a detector's view by threads, some batches ahead of the detector."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.views import Transform
from bigtrain.detectors.pictures import filled, view_of
from bigtrain.runtime.launch import cores
from bigtrain.serving.sources import Named, Reader

MOST_THREADS = 16
AT_ONCE = 16  # pictures of a task: enough for a shard set to read neighbours together


class Ready(NamedTuple):
    """A batch: its pictures, the views of the readable ones filled up to the batch's size, why the others are not."""

    named: list[Named]
    image_B3HW: NDArray[np.uint8] | None
    why_not: list[str]  # "" of those that were read

    @property
    def is_read_b(self) -> NDArray[np.bool_]:
        return np.array([not why for why in self.why_not], bool)


Views = list[NDArray[np.uint8] | str]


def batches_ahead(batches: Iterable[Sequence[Named]], reader: Reader, view: Transform, size: int) -> Iterator[Ready]:
    """Each batch, of at most `size` pictures, in order."""
    threads = min(MOST_THREADS, cores())
    under_way: deque[tuple[list[Named], list[Future[Views]]]] = deque()
    ahead = 1 + max(2, -(-2 * threads * AT_ONCE // size))
    with ThreadPoolExecutor(threads, thread_name_prefix="pictures") as pool:

        def first() -> Ready:
            named, futures = under_way.popleft()
            views = [view for future in futures for view in future.result()]
            readable = [each for each in views if not isinstance(each, str)]
            why_not = [each if isinstance(each, str) else "" for each in views]
            return Ready(named, filled(readable, size) if readable else None, why_not)

        try:
            for batch in batches:
                tasks = [batch[start : start + AT_ONCE] for start in range(0, len(batch), AT_ONCE)]
                under_way.append((list(batch), [pool.submit(views_of, task, reader, view) for task in tasks]))
                if len(under_way) > ahead:
                    yield first()
            while under_way:
                yield first()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def views_of(named: Sequence[Named], reader: Reader, view: Transform) -> Views:
    """The view of each picture, or why there is none."""
    views: Views = []
    for payload in reader.read(named):
        try:
            if isinstance(payload, Exception):
                raise payload
            views.append(view_of(payload, view))
        except (ValueError, OSError) as error:
            views.append(str(error) or type(error).__name__)
    return views
