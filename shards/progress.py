"""How far a build is: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY_S = 10.0


class Progress:
    """Counts images out of `total` (0: not known); those of an earlier run (`done`) do not count into the speed."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self.at_start = total, done, done
        self.begun = self.said = time.monotonic()
        self.bar = (
            tqdm(total=total or None, initial=done, unit=" images", dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def add(self, images: int) -> None:
        self.done += images
        if self.bar is not None:
            self.bar.update(images)
        elif time.monotonic() - self.said >= EVERY_S:
            self.said = time.monotonic()
            self.say(self.line())

    def line(self) -> str:
        speed = self.speed()
        if not self.total:
            return f"{self.done} images, {speed:.0f} images/s"
        left = f", {(self.total - self.done) / speed:.0f} s left" if speed else ""
        return f"{self.done} of {self.total} images, {speed:.0f} images/s{left}"

    def speed(self) -> float:
        return (self.done - self.at_start) / max(time.monotonic() - self.begun, 1e-9)

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
