"""The web service of `bigtrain serve`: its routes, limits and figures; the page is drop.html."""

from __future__ import annotations

import asyncio
import base64
import io
import math
from collections.abc import AsyncIterator
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
from bigtrain.serving.guard import Figures, Guard, sentence
from bigtrain.serving.openapi_bodies import BODY, MOST_FILES, RESPONSES

PAGE = Path(__file__).with_name("drop.html")


@dataclass(frozen=True)
class Limits:
    max_bytes: int  # of a request
    max_pixels: int  # of a picture
    queue: int  # pictures that wait
    max_wait_ms: float  # for a batch to fill
    deadline_s: float  # of a request
    most: int  # pictures of a batch


class Service:
    """A detector and what its requests share: readers that decode, the batcher, the figures."""

    def __init__(self, detector: PictureJudge, threshold: float | None, limits: Limits, name: str) -> None:
        self.detector, self.threshold, self.limits, self.name = detector, threshold, limits, name
        self.batcher = Batcher(
            detector, threshold, most=limits.most, max_wait_s=limits.max_wait_ms / 1000, queue=limits.queue
        )
        self.figures = Figures(self.batcher)
        self.readers = ThreadPoolExecutor(max(2, cores()), thread_name_prefix="pictures")

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        self.batcher.start()
        yield
        await self.batcher.stop()
        self.readers.shutdown()

    async def score(self, request: Request, with_map: bool) -> Response:
        limit_s = self.limits.deadline_s
        try:
            payloads = await asyncio.wait_for(pictures_of_request(request), limit_s)
            if not payloads:
                return sentence(422, "no picture came: send one as the body, or some as files named image.")
            self.batcher.promise(len(payloads))
        except HTTPException as error:
            return sentence(422, f"the form cannot be read ({error.detail}).")
        except ValueError as error:
            return sentence(422, str(error))
        except FullError as full:
            said = f"{self.batcher.promised} pictures are waiting, the queue is full: ask again later."
            return sentence(429, said, **{"Retry-After": str(math.ceil(full.retry_s))})
        except ClientDisconnect:
            return sentence(400, "the request was cut off.")  # nobody reads it
        except TimeoutError:
            return sentence(408, f"the pictures did not come within {limit_s:g} s.")
        try:
            judged = await asyncio.wait_for(self._judged(payloads), limit_s)
        except UnreadableError as error:
            return sentence(422, str(error))
        except TimeoutError:
            return sentence(503, f"no answer within {limit_s:g} s: ask for fewer pictures, or later.")
        finally:
            self.batcher.release(len(payloads))
        for each in judged:
            self.figures.pictures.labels(str(each.novel).lower()).inc()
        names = [each for each, _ in payloads]
        return JSONResponse({"results": [told(n, each, with_map) for n, each in zip(names, judged, strict=True)]})

    async def _judged(self, payloads: list[tuple[str, bytes]]) -> list[Judgement]:
        loop = asyncio.get_running_loop()
        views = await asyncio.gather(
            *(
                loop.run_in_executor(self.readers, viewed, self.detector, name, payload, self.limits)
                for name, payload in payloads
            )
        )
        return await asyncio.gather(*map(self.batcher.judge, views))


def make_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="bigtrain", version=bigtrain.__version__, docs_url=None, redoc_url=None, lifespan=service.running,
        description=f"Novelty scores by {service.name}: higher = more novel.",
    )  # fmt: skip
    app.add_middleware(Guard, max_bytes=service.limits.max_bytes, figures=service.figures)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether it answers, and with which detector."""
        waiting = service.batcher.promised
        return {"status": "ok", "detector": service.name, "threshold": service.threshold, "waiting": waiting}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        latest = prometheus.generate_latest(service.figures.registry)
        return Response(latest, media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.post("/v1/score", openapi_extra={"requestBody": BODY}, responses=RESPONSES)
    async def score(request: Request, map: bool = False) -> Response:
        """Score one picture (the body itself), or several (a form with files named `image`)."""
        return await service.score(request, map)

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
    map_hw = np.nan_to_num(map_hw)
    low, high = float(map_hw.min()), float(map_hw.max())
    grey_hw = ((map_hw - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(grey_hw).save(encoded, "PNG")
    return {"png": base64.b64encode(encoded.getvalue()).decode(), "low": low, "high": high}
