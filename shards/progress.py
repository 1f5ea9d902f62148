"""Progress of a build: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from bigtrain.text import clock

EVERY_S = 10.0


class Progress:
    """Counts images out of `total` (0: not known) and their bytes; what an earlier run did does not count as speed."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.new, self.new_bytes = total, 0, 0, 0
        self.begun = self.said = time.monotonic()
        self.bar = tqdm(total=total or None, unit=" images", dynamic_ncols=True) if sys.stderr.isatty() else None

    def add(self, images: int, bytes_read: int = 0, is_new: bool = True) -> None:
        self.done += images
        if is_new:
            self.new += images
            self.new_bytes += bytes_read
        if self.bar is not None:
            if not is_new:
                self.bar.initial += images
            self.bar.update(images)
            self.bar.set_postfix_str(f"{self.new_bytes / 1e6 / self.seconds():.3g} MB/s")
        elif time.monotonic() - self.said >= EVERY_S:
            self.said = time.monotonic()
            self.say(self.line())

    def line(self) -> str:
        """So much is done, how fast, and how long the rest takes at that speed."""
        of = f" of {self.total}" if self.total else ""
        left = ""
        if self.total and self.new:
            left = f", {clock((self.total - self.done) * self.seconds() / self.new)} left"
        return f"{self.done}{of} images{self.speed()}{left}"

    def speed(self) -> str:
        """With a leading comma; empty where an earlier run did everything."""
        if not self.new:
            return ""
        return f", {self.new / self.seconds():.0f} images/s, {self.new_bytes / 1e6 / self.seconds():.3g} MB/s"

    def seconds(self) -> float:
        return max(time.monotonic() - self.begun, 1e-9)

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
