"""Around every request of the service: a limit of bytes, safe headers, and the figures that /metrics tells."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import prometheus_client as prometheus
from fastapi.responses import JSONResponse

from bigtrain.serving.batcher import Batcher
from bigtrain.text import clean

HELD = 32  # times the bytes of a request: what all together may hold
DRAIN_S, DRAIN_BYTES = 5.0, 256 << 20  # of a request that is too large
SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
     b"img-src blob: data:; connect-src 'self'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
]  # fmt: skip


class Figures:
    """What /metrics tells, in a registry of its own."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = prometheus.CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus.Counter("bigtrain_requests", "Requests to /v1/score, by status", ["status"], **named)
        self.pictures = prometheus.Counter("bigtrain_pictures", "Pictures scored, by decision", ["novel"], **named)
        self.seconds = prometheus.Histogram("bigtrain_request_seconds", "Time of a request to /v1/score", **named)
        waiting = prometheus.Gauge("bigtrain_pictures_waiting", "Pictures accepted and not yet answered", **named)
        waiting.set_function(lambda: batcher.promised)
        batch = prometheus.Gauge("bigtrain_batch_pictures", "Mean pictures of the latest batches", **named)
        batch.set_function(lambda: float(np.mean(batcher.sizes)) if batcher.sizes else 0.0)


class Guard:
    """Limits bytes, told or counted, before they are held; adds safe headers; counts."""

    def __init__(self, app: Any, max_bytes: int, figures: Figures) -> None:
        self.app, self.max_bytes, self.figures = app, max_bytes, figures
        self.held = 0  # bytes of all requests that are being answered

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        came, status, began = 0, 0, time.monotonic()

        async def counted() -> Any:
            nonlocal came
            message = await receive()
            size = len(message.get("body", b""))
            came += size
            self.held += size
            if came > self.max_bytes:
                raise TooLargeError
            if self.held > HELD * self.max_bytes:
                raise TooManyError
            return message

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *SECURITY]
            await send(message)

        try:
            if told.isdigit() and int(told) > self.max_bytes:
                raise TooLargeError
            await self.app(scope, counted, sent)
        except TooLargeError:
            if not status:
                await drained(receive)
                said = f"the request has more than {self.max_bytes} bytes, which is the limit."
                await sentence(413, said)(scope, receive, sent)
        except TooManyError:
            if not status:
                await drained(receive)
                said = "too many requests are being read: ask again later."
                await sentence(429, said, **{"Retry-After": "1"})(scope, receive, sent)
        finally:
            self.held -= came
            if scope["path"] == "/v1/score":
                self.figures.requests.labels(status).inc()
                self.figures.seconds.observe(time.monotonic() - began)


async def drained(receive: Callable[[], Awaitable[Any]]) -> None:
    """Read on for a while and keep nothing: many clients look at an answer only when they have sent everything."""
    until, came = time.monotonic() + DRAIN_S, 0
    while time.monotonic() < until and came < DRAIN_BYTES:
        try:
            message = await asyncio.wait_for(receive(), DRAIN_S)
        except TimeoutError:
            return
        came += len(message.get("body", b""))
        if not message.get("more_body"):
            return


class TooManyError(Exception):
    """The requests that are being read hold too many bytes together."""


class TooLargeError(Exception):
    """More bytes came than are allowed."""


def sentence(status: int, said: str, **headers: str) -> JSONResponse:
    return JSONResponse({"detail": clean(said)}, status, headers=headers)
