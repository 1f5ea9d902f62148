"""The words of a sentence: a noun in the number that its count asks for."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """1 shard, 2 shards, 0 classes."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith(('s', 'x')) else 's'}"
