"""A port where the processes of a run can meet."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")  # Linux's ephemeral ports
TRIES = 100


def free_port() -> int:
    """A free port outside the ephemeral range, so that no connection takes it first.

    Raises:
        OSError: none was found.
    """
    first, last = map(int, GIVEN.read_text().split()) if GIVEN.is_file() else (32_768, 60_999)
    others = [port for port in range(10_000, 65_536) if not first <= port <= last] or [0]
    with socket.socket() as free:
        # a seeded generator would propose the same ports in every program
        for port in random.SystemRandom().sample(others, min(TRIES, len(others))):
            with suppress(OSError):
                free.bind(("", port))
                return int(free.getsockname()[1])
    raise OSError(f"no port of this machine is free, of {TRIES} that were tried.")
