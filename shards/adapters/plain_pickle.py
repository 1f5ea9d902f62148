"""Read a pickle of plain containers and numpy arrays of bytes without running anything that it names.

Nothing is imported or called for a pickle: the four names which an array of numpy needs stand for inert records below,
whose shape and bytes are then put together here. Any other name is refused.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

BYTE_DTYPES = ("u1", "|u1")


class RefusedError(Exception):
    """The pickle asks for more than plain data, or is damaged."""


class _Dtype:
    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, of no matter for the bytes that are read here."""


class _Array:
    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype) or dtype.name not in BYTE_DTYPES or not isinstance(data, bytes):
            raise RefusedError("it holds an array of something else than bytes")
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _NdarrayName:
    """Stands for numpy.ndarray where a pickle only names it."""


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """_codecs.encode(text, "latin1"), as Python 3 writes bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise RefusedError("it encodes text in an unexpected way")
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle._Unpickler):  # in Python: the one in C takes gigabytes for a memo that a few bytes ask for
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise RefusedError(f"it wants to run {module}.{name}, which may do anything")
        return STAND_INS[module, name]


def load(data: bytes) -> Any:
    """The pickle's containers, numbers, bytes and arrays; text of Python 2 comes as bytes."""
    try:
        loaded = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except RefusedError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise RefusedError(f"it is damaged ({type(error).__name__}: {error})") from error
    return _plain(loaded)


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
