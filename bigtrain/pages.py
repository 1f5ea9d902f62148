"""Self-contained HTML pages: templates that escape whatever is put into them, and images as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image


def template(file: Path, **filters: object) -> jinja2.Template:
    """A template; what is put into it is escaped, and what it lacks is an error. It may include its neighbours."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(file.parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template(file.name)


def data_uri(image: Image.Image, is_png: bool) -> str:
    """An image inside of a page: PNG keeps every pixel, JPEG is smaller for photographs."""
    encoded = io.BytesIO()
    if is_png:
        image.save(encoded, "PNG", optimize=True)
    else:
        image.save(encoded, "JPEG", quality=85)
    return f"data:image/{'png' if is_png else 'jpeg'};base64,{base64.b64encode(encoded.getvalue()).decode()}"
