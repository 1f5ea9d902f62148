"""Progress over many images: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm

from bigtrain.text import clock

EVERY_S = 10.0


class Progress:
    """Counts images and their bytes; what an earlier run did does not count as speed.

    Args:
        total: how many images there will be; 0: not known.
        name: of what is done with them, before each line.
        is_shown: False: say nothing, as on all ranks but one.
        has_bar: False: lines on a terminal too, where several processes would draw their bars over each other.
    """

    def __init__(self, total: int, name: str = "", *, is_shown: bool = True, has_bar: bool = True) -> None:
        self.total, self.name, self.is_shown = total, name, is_shown
        self.done, self.new, self.new_bytes = 0, 0, 0
        self.begun = self.said = time.monotonic()
        self.bar = None
        if is_shown and has_bar and sys.stderr.isatty():
            self.bar = tqdm(total=total or None, desc=name or None, unit=" images", dynamic_ncols=True, leave=not name)

    def add(self, images: int, bytes_read: int = 0, is_new: bool = True) -> None:
        self.done += images
        if is_new:
            self.new += images
            self.new_bytes += bytes_read
        if self.bar is not None:
            if not is_new:
                self.bar.initial += images
            self.bar.update(images)
            if self.new_bytes:
                self.bar.set_postfix_str(f"{self.new_bytes / 1e6 / self.seconds():.3g} MB/s")
        elif self.is_shown and time.monotonic() - self.said >= EVERY_S:
            self.said = time.monotonic()
            self.say(self.line())

    def line(self) -> str:
        """So much is done, how fast, and how long the rest takes at that speed."""
        name, of = f"{self.name}: " if self.name else "", f" of {self.total}" if self.total else ""
        left = ""
        if self.total and self.new:
            left = f", {clock((self.total - self.done) * self.seconds() / self.new)} left"
        return f"{name}{self.done}{of} images{self.speed()}{left}"

    def speed(self) -> str:
        """With a leading comma; empty where an earlier run did everything."""
        if not self.new:
            return ""
        images_per_s = self.new / self.seconds()
        of_bytes = f", {self.new_bytes / 1e6 / self.seconds():.3g} MB/s" if self.new_bytes else ""
        return f", {images_per_s:.{0 if images_per_s >= 10 else 2}f} images/s{of_bytes}"

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
