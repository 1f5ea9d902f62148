"""What `/v1/score` takes and answers, as OpenAPI says it."""

from __future__ import annotations

from typing import Any

MOST_FILES = 64  # of a request
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
