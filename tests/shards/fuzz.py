"""Odd and damaged pictures: do build, stream, score and page take the same ones, and see the same pixels?

    python -m tests.shards.fuzz FOLDER --count 10000

Each file of FOLDER is tried as it is, then mutated copies of them up to COUNT: bytes flipped, cut, doubled, zeroed or
swapped between files. Prints how many were taken and refused, and every disagreement, crash or slow one; exit code 1
where there was any. Pillow's and libjpeg-turbo's test images make a good corpus.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bigtrain.data.decode import Picture
from bigtrain.images import UnreadableError, decode_rgb
from shards.treatment import Treated, Treatment, checked

SLOW_S = 20.0
SMALL = 48  # --max-side
FEW_LEVELS = 3.0  # mean difference of two JPEG decoders
LARGE_PIXELS = 4_000_000  # such pictures are tried as they are, and not mutated


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A copy with one to four random damages."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) + 1) if rng.random() < 0.5 else rng.randrange(min(len(changed), 256) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 256))
        match rng.randrange(6):
            case 0:
                changed[place : place + length] = rng.randbytes(length)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = changed[place : place + length]
            case 3:
                changed[place : place + length] = bytes(length)
            case 4:
                changed[place : place + length] = other[place : place + length]
            case 5:
                del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def tried(what: str, data: bytes) -> tuple[np.ndarray | None, str]:
    """What one of the ways sees of a picture, or why it refuses it."""
    try:
        if what == "build":
            made: Treated = checked(data, "x", Treatment(verify="decode"))
            return np.array([made.height, made.width]), ""
        if what == "smaller":
            return np.asarray(Picture(checked(data, "x", Treatment(max_side=SMALL)).encoded).rgb()), ""
        if what == "stream":
            picture = Picture(data)
            pixels = np.asarray(picture.rgb())
            assert pixels.shape[:2] == (picture.height, picture.width), "its header tells of another size"
            return pixels, ""
        return decode_rgb(data), ""
    except UnreadableError as error:
        return None, str(error)


def disagreements(data: bytes) -> Iterator[str]:
    """A sentence for each way in which commands differ about a picture."""
    found = {what: tried(what, data) for what in ("build", "stream", "page")}
    taken = [what for what, (seen, _) in found.items() if seen is not None]
    if len(taken) not in (0, len(found)):
        reasons = {what: why for what, (seen, why) in found.items() if seen is None}
        yield f"only {' and '.join(taken)} takes it: {reasons}"
    size, stream, page = (found[what][0] for what in ("build", "stream", "page"))
    if size is None or stream is None or page is None:
        return
    if stream.shape != page.shape or tuple(size) != stream.shape[:2]:
        yield f"sizes differ: build {tuple(size)}, stream {stream.shape}, page {page.shape}"
    elif np.abs(stream.astype(int) - page).mean() > FEW_LEVELS:
        yield f"pixels differ by {np.abs(stream.astype(int) - page).mean():.1f} levels in the mean"
    if max(size) > SMALL:
        small, why = tried("smaller", data)
        if small is None:
            yield f"--max-side refuses it: {why}"
        elif max(small.shape[:2]) != SMALL:
            yield f"--max-side makes it {small.shape[1]} x {small.shape[0]}"


def corpus(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def inputs(files: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    yield from list(files.items())[:count]
    small = [name for name, data in files.items() if 0 < len(data) < 200_000 and pixels_of(data) < LARGE_PIXELS]
    for number in range(count - len(files)):
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(small)
        yield f"{name} mutated by {seed} {number}", mutated(files[name], files[rng.choice(small)], rng)


def pixels_of(data: bytes) -> int:
    try:
        picture = Picture(data)
    except UnreadableError:
        return 0
    return picture.height * picture.width


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    for name, data in inputs(corpus(given.folder), given.count, given.seed):
        began = time.monotonic()
        try:
            wrong = list(disagreements(data))
        except Exception as error:  # what this is looking for
            wrong = [f"crash: {type(error).__name__}: {error}"]
        if time.monotonic() - began > SLOW_S:
            wrong.append(f"took {time.monotonic() - began:.0f} s")
        counts["taken" if tried("stream", data)[0] is not None else "refused"] += 1
        counts["wrong"] += bool(wrong)
        for sentence in wrong:
            print(f"{name}: {sentence}", flush=True)
    print(f"{sum((counts['taken'], counts['refused']))} inputs: {dict(counts)}")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
