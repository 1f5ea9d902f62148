"""The one retry policy: transient errors of disks and servers are tried again, permanent ones are raised at once."""

from __future__ import annotations

import errno
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Answer = TypeVar("Answer")

MAX_WAIT_S = 30.0
TRANSIENT_STATUS = (408, 425, 429)  # of HTTP's 4xx: too slow, too early, too many requests
TRANSIENT_CODES = ("BadDigest", "IncompleteBody", "RequestTimeout")  # of S3's status 400
PERMANENT = (
    FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError, TypeError,
    NotImplementedError, MemoryError,
)  # fmt: skip
PERMANENT_ERRNO = (errno.ELOOP, errno.ENAMETOOLONG)
_jitter = random.SystemRandom()  # neither the run's random numbers nor those of other workers take part


@dataclass(frozen=True)
class RetryPolicy:
    """Up to `attempts` requests, with waits of about first_wait_s, twice that, and so on up to MAX_WAIT_S.

    A request may take timeout_s, and the time that its bytes take on a slow line.
    """

    attempts: int = 6
    first_wait_s: float = 0.5
    timeout_s: float = 30.0

    def wait_s(self, attempt: int) -> float:
        """How long to wait after a failed attempt, counted from 1; with jitter, so that workers do not keep step."""
        return min(MAX_WAIT_S, self.first_wait_s * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.5)


DEFAULT = RetryPolicy()


def retried(
    request: Callable[[], Answer], policy: RetryPolicy, note: Callable[[str], None] = lambda text: None
) -> Answer:
    """Make a request until it succeeds.

    Args:
        note: gets a line for each attempt that failed and is followed by another.

    Raises:
        Exception: the request's own, at once where it is permanent, else that of the last attempt.
    """
    for attempt in range(1, policy.attempts + 1):
        try:
            return request()
        except Exception as error:  # each file system has errors of its own
            if is_permanent(error) or attempt == policy.attempts:
                raise
            wait_s = policy.wait_s(attempt)
            note(f"{described(error)}; attempt {attempt + 1} of {policy.attempts} in {wait_s:.1f} s")
        time.sleep(wait_s)
    raise AssertionError("unreachable")


def is_permanent(error: BaseException) -> bool:
    """Whether trying again cannot help; an HTTP status decides where there is one."""
    if isinstance(error, TimeoutError | json.JSONDecodeError):  # an OSError; a ValueError, of an answer cut short
        return False
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict) and response.get("Error", {}).get("Code") in TRANSIENT_CODES:
        return False
    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in TRANSIENT_STATUS
    return isinstance(error, PERMANENT) or (isinstance(error, OSError) and error.errno in PERMANENT_ERRNO)


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore (below s3fs's own error) or gcsfs, if there is one."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    numbers = (getattr(error, name, None) for name in ("status", "code"))
    return next((number for number in numbers if isinstance(number, int)), None)


def described(error: BaseException) -> str:
    """An error on one line, with its type."""
    return " ".join(f"{type(error).__name__}: {error}".split())
