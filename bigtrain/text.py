"""Words and counts for people: what may be printed on a terminal, and how long things take."""

from __future__ import annotations


def clean(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def clock(seconds: float) -> str:
    """4000 -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
