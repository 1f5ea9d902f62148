"""A build's local disk: one writer in a folder, a clear error when the disk is full, early write-back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def start_writing(file: IO[bytes]) -> None:
    """Have the system begin to write what it holds of a file, so that the sync at the end finds little to do."""
    if hasattr(os, "posix_fadvise"):
        file.flush()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Refuse a second process that would write to the folder; the lock ends with its process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another build is writing to {folder}: wait for it, or give another --out.") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def space_for(out: str) -> Iterator[None]:
    """Report a full disk in one sentence; finished files stay."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(  # without an errno, so that the caller does not rewrite the message
            f"no space is left for {out} ({error.strerror}): free some, or allow larger files, and run the same "
            "command again; a build continues with what is finished."
        ) from error
