"""Pictures of many requests scored together: the one place of a server that uses the detector's networks."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bigtrain.detectors.calibration import Judgement
from bigtrain.detectors.picture_judge import PictureJudge


class FullError(Exception):
    """More pictures wait than the queue takes; `retry_s`: how long these will need."""

    def __init__(self, retry_s: float) -> None:
        super().__init__(retry_s)
        self.retry_s = retry_s


@dataclass
class Waiting:
    image_3HW: NDArray[np.uint8]
    answer: asyncio.Future[Judgement]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Scores what waits as soon as a batch is full, or the oldest picture has waited for `max_wait_s`.

    A batch has the pictures that there are, so that the last digits of a score may differ from those of the run's own
    batches, which are of one size.

    Args:
        most: pictures of a batch.
        queue: pictures that may wait; more are refused.
    """

    def __init__(
        self, detector: PictureJudge, threshold: float | None, *, most: int, max_wait_s: float, queue: int
    ) -> None:
        self.detector, self.threshold = detector, threshold
        self.most, self.max_wait_s, self.queue = most, max_wait_s, queue
        self.waiting: deque[Waiting] = deque()
        self.promised = 0  # pictures that were accepted, and are being decoded, wait or are scored
        self.sizes: deque[int] = deque(maxlen=1000)  # of the latest batches
        self._per_picture_s = 0.05
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detector")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """When all that was accepted is answered."""
        if self._task is not None:
            while self.waiting:
                await asyncio.sleep(0.01)
            self._task.cancel()
        self._thread.shutdown()

    def promise(self, pictures: int) -> None:
        """Raises FullError: they do not fit the queue now; ValueError: they never will."""
        if pictures > self.queue:
            raise ValueError(f"{pictures} pictures came, and at most {self.queue} are scored at once: send fewer.")
        if self.promised + pictures > self.queue:
            raise FullError(max(self.promised * self._per_picture_s, 1.0))
        self.promised += pictures

    def release(self, pictures: int) -> None:
        self.promised -= pictures

    async def judge(self, image_3HW: NDArray[np.uint8]) -> Judgement:
        waiting = Waiting(image_3HW, asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self.waiting:
                self._arrived.clear()
                await self._arrived.wait()
            left_s = self.waiting[0].since + self.max_wait_s - time.monotonic()
            if len(self.waiting) < self.most and left_s > 0:
                self._arrived.clear()
                try:
                    await asyncio.wait_for(self._arrived.wait(), left_s)
                except TimeoutError:
                    pass
                else:
                    continue
            some = [self.waiting.popleft() for _ in range(min(self.most, len(self.waiting)))]
            some = [each for each in some if not each.answer.done()]  # else its request has given up
            if not some:
                continue
            began = time.monotonic()
            try:
                judged = await loop.run_in_executor(self._thread, self._score, [each.image_3HW for each in some])
            except Exception as error:
                for each in some:
                    if not each.answer.done():
                        each.answer.set_exception(error)
                continue
            self._per_picture_s += 0.1 * ((time.monotonic() - began) / len(some) - self._per_picture_s)
            self.sizes.append(len(some))
            for each, judgement in zip(some, judged, strict=True):
                if not each.answer.done():
                    each.answer.set_result(judgement)

    def _score(self, images: list[NDArray[np.uint8]]) -> list[Judgement]:
        return self.detector.judgements(self.detector.score_views(np.stack(images)), self.threshold)
