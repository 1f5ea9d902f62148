"""`bigtrain serve`: a detector behind HTTP."""

from __future__ import annotations

import errno
import signal
import socket
from dataclasses import dataclass
from importlib.util import find_spec

from bigtrain.serving.any_detector import any_detector, file_of

NEEDS = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "multipart": "python-multipart",
    "prometheus_client": "prometheus-client",
}


@dataclass(frozen=True)
class Options:
    """Of the command; see its help."""

    detector: str
    host: str
    port: int
    threshold: str
    device: str | None
    batch: int
    max_wait_ms: float
    max_mb: float
    max_pixels: int
    queue: int
    deadline_s: float


def serve(options: Options) -> int:
    """Serve until SIGTERM or Ctrl-C, which wait for the requests that were accepted.

    Raises:
        ValueError: a mistake in the command; nothing is served.
    """
    if missing := [package for module, package in NEEDS.items() if find_spec(module) is None]:
        raise ValueError(f"bigtrain serve needs {', '.join(missing)}: install bigtrain[serve].")
    for name in ("batch", "queue", "max_mb", "max_pixels", "deadline_s"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be above 0.")
    if options.max_wait_ms < 0:
        raise ValueError(f"--max-wait-ms {options.max_wait_ms} must not be below 0.")
    file_of(options.detector)
    listening = bound(options.host, options.port)
    import uvicorn
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from bigtrain.serving.app import Limits, Service, make_app

    detector = any_detector(options.detector, options.device)
    threshold = detector.threshold(options.threshold)
    limits = Limits(
        max_bytes=int(options.max_mb * 1e6), max_pixels=options.max_pixels, queue=options.queue,
        max_wait_ms=options.max_wait_ms, deadline_s=options.deadline_s, most=options.batch,
    )  # fmt: skip
    app = make_app(Service(detector, None if threshold is None else threshold.value, limits, options.detector))
    if options.host in ("127.0.0.1", "localhost", "::1"):
        # a page of elsewhere whose name leads here must not read the answers
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    port = listening.getsockname()[1]
    print(f"serving {options.detector} at http://{options.host}:{port}/ (Ctrl-C ends it)", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has stopped
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=5, h11_max_incomplete_event_size=65536
    )
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def bound(host: str, port: int) -> socket.socket:
    """Raises ValueError: the port is in use, or not ours to take."""
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port}: a port lies within 0 and 65535; 0 is any that is free.")
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(2048)  # who asks while the server starts waits for it
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
        raise ValueError(f"port {port} of {host} {why}: give another --port, or 0 for any that is free.") from error
    return listening
