"""The web service of `bigtrain serve`: its routes, limits and figures; the page is drop.html."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client as prometheus
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import bigtrain
from bigtrain.data.decode import Picture
from bigtrain.detectors.calibration import Judgement
from bigtrain.detectors.picture_judge import PictureJudge
from bigtrain.images import UnreadableError
from bigtrain.runtime.launch import cores
from bigtrain.serving.batcher import Batcher, FullError
from bigtrain.text import clean

PAGE = Path(__file__).with_name("drop.html")
MOST_FILES = 64  # of a request
DRAIN_S, DRAIN_BYTES = 5.0, 256 << 20  # of a request that is too large
SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
     b"img-src blob: data:; connect-src 'self'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
]  # fmt: skip


@dataclass(frozen=True)
class Limits:
    max_bytes: int = 32 << 20  # of a request
    max_pixels: int = 50_000_000  # of a picture
    queue: int = 256  # pictures that wait
    max_wait_ms: float = 10.0  # for a batch to fill
    deadline_s: float = 30.0  # of a request
    most: int = 32  # pictures of a batch


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
    """Around every request: a limit of bytes, told or counted, before they are held; safe headers; figures."""

    def __init__(self, app: Any, max_bytes: int, figures: Figures) -> None:
        self.app, self.max_bytes, self.figures = app, max_bytes, figures

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        came, status, began = 0, 0, time.monotonic()

        async def counted() -> Any:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.max_bytes:
                raise TooLargeError
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
        finally:
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


class TooLargeError(Exception):
    """More bytes came than are allowed."""


def sentence(status: int, said: str, **headers: str) -> JSONResponse:
    return JSONResponse({"detail": clean(said)}, status, headers=headers)


def make_app(detector: PictureJudge, threshold: float | None, limits: Limits, name: str) -> FastAPI:
    batcher = Batcher(detector, threshold, most=limits.most, max_wait_s=limits.max_wait_ms / 1000, queue=limits.queue)
    figures, readers = Figures(batcher), ThreadPoolExecutor(max(2, cores()), thread_name_prefix="pictures")

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()
        readers.shutdown()

    app = FastAPI(
        title="bigtrain", version=bigtrain.__version__, description=f"Novelty scores by {name}: higher = more novel.",
        docs_url=None, redoc_url=None, lifespan=running,
    )  # fmt: skip
    app.add_middleware(Guard, max_bytes=limits.max_bytes, figures=figures)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether it answers, and with which detector."""
        return {"status": "ok", "detector": name, "threshold": threshold, "waiting": batcher.promised}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(prometheus.generate_latest(figures.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.post("/v1/score", openapi_extra={"requestBody": BODY}, responses=RESPONSES)
    async def score(request: Request, map: bool = False) -> Response:
        """Score one picture (the body itself), or several (a form with files named `image`)."""
        try:
            payloads = await asyncio.wait_for(pictures_of_request(request), limits.deadline_s)
            if not payloads:
                return sentence(422, "no picture came: send one as the body, or some as files named image.")
            batcher.promise(len(payloads))
        except HTTPException as error:
            return sentence(422, f"the form cannot be read ({error.detail}).")
        except FullError as full:
            after = {"Retry-After": str(math.ceil(full.retry_s))}
            return sentence(
                429, f"{batcher.promised} pictures are waiting, the queue is full: ask again later.", **after
            )
        except ClientDisconnect:
            return sentence(400, "the request was cut off.")  # nobody reads it
        except TimeoutError:
            return sentence(408, f"the pictures did not come within {limits.deadline_s:g} s.")
        try:
            judged = await asyncio.wait_for(all_judged(payloads), limits.deadline_s)
        except UnreadableError as error:
            return sentence(422, str(error))
        except TimeoutError:
            return sentence(503, f"no answer within {limits.deadline_s:g} s: ask for fewer pictures, or later.")
        finally:
            batcher.release(len(payloads))
        for each in judged:
            figures.pictures.labels(str(each.novel).lower()).inc()
        names = [each for each, _ in payloads]
        return JSONResponse({"results": [told(n, each, map) for n, each in zip(names, judged, strict=True)]})

    async def all_judged(payloads: list[tuple[str, bytes]]) -> list[Judgement]:
        loop = asyncio.get_running_loop()
        views = await asyncio.gather(
            *(loop.run_in_executor(readers, viewed, detector, each, payload, limits) for each, payload in payloads)
        )
        return await asyncio.gather(*map(batcher.judge, views))

    return app


async def pictures_of_request(request: Request) -> list[tuple[str, bytes]]:
    """The name and the bytes of each picture."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        async with request.form(max_files=MOST_FILES, max_fields=MOST_FILES) as form:
            files = [each for _, each in form.multi_items() if isinstance(each, UploadFile)]
            return [(each.filename or f"picture {n}", await each.read()) for n, each in enumerate(files, start=1)]
    body = await request.body()
    return [("picture 1", body)] if body else []


def viewed(detector: PictureJudge, name: str, payload: bytes, limits: Limits) -> NDArray[np.uint8]:
    """Raises UnreadableError, which names the picture."""
    try:
        picture = Picture(payload)
        if picture.width * picture.height > limits.max_pixels:
            raise UnreadableError(
                f"too many pixels: {picture.width} x {picture.height}, and at most {limits.max_pixels} are scored"
            )
        return detector.view()(picture, np.random.default_rng(0))["image"]  # type: ignore[return-value]
    except (ValueError, OSError) as error:
        raise UnreadableError(f"{name[:200]} cannot be scored: {error}") from error


def told(name: str, judged: Judgement, with_map: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "name": name[:200].encode("utf-8", "replace").decode(),
        "score": judged.score if math.isfinite(judged.score) else None,
        "p_value": judged.p_value,
        "novel": judged.novel,
        "class": judged.class_name,
    }
    if with_map:
        answer["map"] = None if judged.map_hw is None else map_of(judged.map_hw)
    return answer


def map_of(map_hw: NDArray[np.float32]) -> dict[str, Any]:
    """The patch scores of a picture as a PNG of greys, black at `low` and white at `high`."""
    low, high = float(map_hw.min()), float(map_hw.max())
    grey_hw = ((map_hw - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(grey_hw).save(encoded, "PNG")
    return {"png": base64.b64encode(encoded.getvalue()).decode(), "low": low, "high": high}


PICTURE = {"type": "string", "format": "binary"}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {"image": {"type": "array", "items": PICTURE, "minItems": 1, "maxItems": MOST_FILES}},
            }
        },
        "image/*": {"schema": PICTURE},
    },
}
NUMBER = {"type": ["number", "null"]}
RESULT = {
    "type": "object",
    "required": ["name", "score", "p_value", "novel", "class"],
    "properties": {
        "name": {"type": "string"},
        "score": NUMBER,
        "p_value": NUMBER,
        "novel": {"type": ["boolean", "null"]},
        "class": {"type": ["string", "null"]},
        "map": {
            "type": ["object", "null"],
            "properties": {"png": {"type": "string"}, "low": {"type": "number"}, "high": {"type": "number"}},
        },
    },
}
ANSWER = {"type": "object", "required": ["results"], "properties": {"results": {"type": "array", "items": RESULT}}}
# FastAPI's own answer to a wrong ?map= is a 422 with a list of what is wrong
REFUSED = {"type": "object", "required": ["detail"], "properties": {"detail": {"type": ["string", "array"]}}}
JUDGED = "The judgement of each picture, in their order."
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": JUDGED, "content": {"application/json": {"schema": ANSWER}}},
    **{
        status: {"description": why, "content": {"application/json": {"schema": REFUSED}}}
        for status, why in {
            408: "The pictures did not come in time.",
            413: "Too many bytes.",
            422: "A picture cannot be scored, or the request cannot be read: a sentence says why.",
            429: "The queue is full: Retry-After says when to ask again.",
            503: "No answer within the deadline.",
        }.items()
    },
}  # fmt: skip
