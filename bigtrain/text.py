"""Text for people: what may be printed on a terminal, counts with their nouns, durations."""

from __future__ import annotations


def clean(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def clock(seconds: float) -> str:
    """4000 -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def counted(number: int, noun: str) -> str:
    """1 shard, 2 shards, 0 classes."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith(('s', 'x')) else 's'}"
