"""Opens files of weights of any owner, without running code in them, and finds the tensors in their wrappers."""

from __future__ import annotations

import argparse
import codecs
import json
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigtrain.models.augreg import from_augreg

ABOUT = "bigtrain"  # key of the metadata of our own files
AVERAGES = ("state_dict_ema", "model_ema", "ema", "teacher")  # of timm, DeiT and ConvNeXt; DINO's teacher is one
SINGLE_FILE, INDEX = ("model.safetensors", "pytorch_model.bin"), "model.safetensors.index.json"


class Read(NamedTuple):
    tensors: dict[str, Tensor]
    about: dict[str, Any]  # what bigtrain wrote about them
    said: str = ""  # what is to be said of them


def read_file(path: Path, weights_key: str = "") -> Read:
    """The tensors of a file, or of a folder in Hugging Face's form.

    Args:
        weights_key: which of several sets of weights: where it lies in the file, as in "model_ema".

    Raises:
        ValueError: what lies there is no file of weights, is damaged, or cannot be read without running its code.
    """
    if path.is_dir():
        found = read_folder(path)
        return _chosen({"": found.tensors}, path, weights_key)._replace(said=found.said)
    check_is_weights(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        tensors, about = read_tensors(path)
        return _chosen({"": tensors}, path, weights_key)._replace(about=about)
    if suffix == ".npz":
        return _chosen({"": from_augreg(path)}, path, weights_key)
    sets = dict(_sets(_unpickled(path)))
    most = max(map(len, sets.values()), default=0)
    sets = {key: tensors for key, tensors in sets.items() if len(tensors) * 10 > most}  # not a loss's few buffers
    if not sets:
        raise ValueError(f"{path} holds no state_dict: save the tensors of a network by name.")
    return _chosen(sets, path, weights_key)


def _chosen(sets: Mapping[str, dict[str, Tensor]], path: Path, weights_key: str) -> Read:
    """The set of weights that a key names; without one the only set, or the moving average."""
    if weights_key:
        prefix = f"{weights_key}."
        below = {key.removeprefix(prefix): each for key, each in sets.get("", {}).items() if key.startswith(prefix)}
        if weights_key not in sets and not below:
            there = [*filter(None, sets), *sorted({key.split(".")[0] for key in sets.get("", {})})]
            raise ValueError(f"{path} has no weights {weights_key!r}; it has {', '.join(there[:8])}.")
        return Read(sets.get(weights_key, below), {}, f"; of the file's weights, {weights_key}")
    averages = [key for average in AVERAGES for key in sets if key.rpartition(".")[2] == average]
    others = [key for key in sets if key not in averages and key]
    if averages and others:
        said = f"; the moving average {averages[0]} is taken, not the raw weights {others[0]} beside it"
        return Read(sets[averages[0]], {}, said)
    if len(sets) > 1 and not averages:
        raise ValueError(
            f"{path} holds several sets of weights ({', '.join(sets)}): choose one with --weights-key, as in "
            f"--weights-key {others[0]}."
        )
    return Read(sets[averages[0]] if averages else next(iter(sets.values())), {})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a .safetensors file, and what `save_tensors` wrote about them; nothing for files of others."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118 (file is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): give a whole .safetensors file.") from error


def read_folder(folder: Path) -> Read:
    """The tensors of a folder in Hugging Face's form: one file, or several that an index lists."""
    if (index := folder / INDEX).is_file():
        try:
            listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of files of weights ({error}).") from error
        tensors: dict[str, Tensor] = {}
        for name in listed:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, which lies outside of its folder.")
            if not (folder / name).is_file():
                raise ValueError(f"{folder} lacks {name}, which {INDEX} lists: download it too.")
            tensors |= read_file(folder / name).tensors
        return Read(tensors, {}, f"; {len(listed)} files")
    for name in SINGLE_FILE:
        if (folder / name).is_file():
            return read_file(folder / name)
    raise ValueError(f"{folder} holds no weights: give a folder with one of {', '.join((*SINGLE_FILE, INDEX))}.")


def check_is_weights(path: Path) -> None:
    """Refuse what is downloaded in place of weights, and what is not there."""
    with path.open("rb") as file:
        begin = file.read(256)
    if not begin:
        raise ValueError(f"{path} is empty: download it again.")
    if begin.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the file it stands for: fetch it with `git lfs pull`, or download it."
        )
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not weights: its download needs another address, or a login.")


def _unpickled(path: Path) -> Any:
    """What torch.save wrote; of classes only those that hold values and do nothing."""
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch have errors of their own
        foreign: list[str] = []
        with suppress(Exception), torch.serialization.safe_globals(_harmless()):
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if foreign:
            raise ValueError(
                f"{path} cannot be read without running code: it holds objects of {', '.join(foreign[:4])}"
                f"{', ...' if foreign[4:] else ''}. Save its state_dict of tensors alone, as .pth or .safetensors."
            ) from error
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive, which is code: save the state_dict of its network instead."
            ) from error
        why = str(error).partition("\n")[0][:120]
        raise ValueError(
            f"{path} is cut short or damaged, or was not written by torch.save ({type(error).__name__}: {why}): "
            "download or save it again."
        ) from error


def _harmless() -> list[Any]:
    """Classes that trainers leave beside the tensors: options, numpy's numbers and arrays, paths, kinds of dicts."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u8", "?", "S1", "U1")}
    paths = [(pathlib.PurePosixPath, f"{place}.{name}Path") for place in ("pathlib", "pathlib._local")
             for name in ("Posix", "PurePosix", "Windows", "PureWindows")]  # fmt: skip
    dicts = [(dict, f"{place}.AttributeDict") for place in (
        "lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing",
    )]  # fmt: skip
    return [
        argparse.Namespace, np.ndarray, np.dtype, *dtypes, (codecs.encode, "_codecs.encode"), *paths, *dicts,
        *((function, f"{module}.multiarray.{name}") for module in ("numpy.core", "numpy._core")
          for function, name in ((scalar, "scalar"), (rebuild, "_reconstruct"))),
    ]  # fmt: skip


def _sets(held: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every set of named tensors in what a file holds, by its place in it; "": the file itself."""
    if not isinstance(held, Mapping):
        return
    own = {key: value for key, value in held.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if own:
        yield place, own
    for key, value in held.items() if depth else ():
        if isinstance(key, str) and not key.startswith(("optim", "lr_scheduler", "scheduler", "scaler", "rng")):
            yield from _sets(value, f"{place}.{key}" if place else key, depth - 1)
