"""Text for people: what may be printed on a terminal, counts with their nouns, durations."""

from __future__ import annotations

import codecs
import contextlib
import errno
import re
import tempfile
import traceback
import unicodedata
from itertools import pairwise
from pathlib import Path

OURS = ("bigtrain", "recipes", "shards", "slurm")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# what moves a cursor, ends a line, turns the direction of writing, or is no character at all
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return UNSAFE.sub(lambda found: "\n" if found[0] == "\n" else "?", text)


def decoded(data: bytes, errors: str = "strict") -> str:
    """Text in UTF-8, without the byte order mark that Windows puts before it; or in UTF-16 with such a mark."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf16 else "utf-8-sig", errors)


def class_name(text: str) -> str:
    """A name as classes are compared: without spaces around, in the composed form (NFC) of its characters.

    The same name reaches us in two forms: macOS writes the names of files decomposed, Linux and Windows composed. Under
    an ASCII locale Python gives the bytes of UTF-8 as surrogates.
    """
    with contextlib.suppress(UnicodeError):
        text = text.encode("utf-8", "surrogateescape").decode()
    return unicodedata.normalize("NFC", text).strip()


def alike(text: str) -> str:
    """Equal for names that a person would take for one: Cat and cat, 3 and 3.0."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return re.sub(r"^(-?\d+)\.0+$", r"\1", plain)


def told(error: Exception) -> str:
    """What an error says to a user. Our own sentences stand alone; those of libraries say whose they are."""
    if isinstance(error, OSError) and error.errno in NO_SPACE and not error.filename:
        return f"no space is left on the disk of --out, or of {tempfile.gettempdir()}: free some, and start again."
    if isinstance(error, ImportError | OSError) and type(error).__module__ == "builtins":
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = Path(frames[-1].filename).parts if frames else ()
    library = next((after for folder, after in pairwise(place) if folder in ("site-packages", "dist-packages")), "")
    own_module = type(error).__module__.partition(".")[0]
    library = library if own_module in ("builtins", *OURS) else own_module
    return str(error) if library in ("", *OURS) else f"{library} says: {type(error).__name__}: {error}"


def clock(seconds: float) -> str:
    """4000 -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def counted(number: int, noun: str) -> str:
    """1 shard, 2 shards, 0 classes."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith(('s', 'x')) else 's'}"
