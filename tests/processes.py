"""What runs on this machine: for tests of what outlives what."""

import contextlib
from pathlib import Path


def running_in_session(session: int) -> list[str]:
    """Processes of a session that are no zombies: /proc/<pid>/stat is pid (name) state parent group session ..."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(path.parent.name)
    return found
