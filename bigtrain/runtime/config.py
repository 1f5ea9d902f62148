"""Settings of a recipe (a dataclass, a TOML file underneath, flags on top), and the one sentence for a mistake."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch.distributed as dist
import tyro

USER_ERROR = 2  # exit code


@dataclass(frozen=True)
class RunSettings:
    """Settings that must not change the result; every recipe has them as its field `run`."""

    out: str = ""
    """Run folder; the same command again continues in it."""
    workers: int = 0
    """Processes for each rank that read and decode; 0 does it in the training process."""
    log_every: int = 20
    """Steps between two lines of the log."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""


C = TypeVar("C")


def read_settings(config_class: type[C], argv: Sequence[str], preset: Path | None = None) -> C:
    """Defaults, then `preset`, then `--config FILE.toml`, then flags. `--print-config` prints them as JSON and ends."""
    arguments = list(argv)
    show = "--print-config" in arguments
    if show:
        arguments.remove("--print-config")
    config: Any = config_class()
    if preset:
        config = overlay(config, preset)
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            if not equals and place + 1 == len(arguments):
                raise ValueError("--config was given without a file: name a .toml file of settings.")
            config = overlay(config, Path(value if equals else arguments[place + 1]))
            del arguments[place : place + (1 if equals else 2)]
            break
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[config_class],  # type: ignore[misc,valid-type]
        args=arguments,
        default=config,
        description=(sys.modules[config_class.__module__].__doc__ or "").strip()
        + "\n\n--config FILE.toml: settings underneath the flags.  --print-config: show the settings as JSON and end.",
    )
    if show:
        print(json.dumps(dataclasses.asdict(config), indent=1))
        raise SystemExit(0)
    return config


def overlay(config: C, path: Path) -> C:
    """Settings of a TOML file over a config; tables are nested groups, and names may also stand at the top."""
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): --config takes a .toml file of settings."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from error
    own_kinds, run_kinds = get_type_hints(type(config)), get_type_hints(RunSettings)
    del own_kinds["run"]
    flat = {key: value for key, value in given.items() if key != "run"}
    run = {key: flat.pop(key) for key in list(flat) if key in run_kinds}
    group = given.get("run", {})
    run |= group if isinstance(group, dict) else {"run": group}
    for kinds, values in ((own_kinds, flat), (run_kinds, run)):
        for key, value in values.items():
            if key not in kinds:
                near = difflib.get_close_matches(key, sorted(own_kinds | run_kinds), n=2)
                raise ValueError(f"{path}: there is no setting {key!r}; near it: {', '.join(near) or 'see --help'}.")
            values[key] = tuple(value) if isinstance(value, list) else value
            if not _fits(values[key], kinds[key]):
                kind = kinds[key].__name__ if isinstance(kinds[key], type) else str(kinds[key])
                raise ValueError(f"{path}: {key} is {value!r}; it must be {kind.removeprefix('typing.')}.")
    return dataclasses.replace(config, **flat, run=dataclasses.replace(config.run, **run))  # type: ignore[type-var,attr-defined]


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML file is what a setting's type allows; a whole number serves as a float."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        one, *others = get_args(kind)
        kinds = [one] * len(value) if others == [...] and isinstance(value, tuple) else [one, *others]
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def result_settings(config: Any) -> dict[str, Any]:
    """The settings that change the result, as plain JSON values."""
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    record.pop("run")
    return record


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """End with exit code 2 and one sentence on a user's mistake; `BIGTRAIN_TRACEBACK=1` shows where it was raised."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        if os.environ.get("BIGTRAIN_TRACEBACK"):
            traceback.print_exc()
        # before a process group forms, every rank finds the same mistake: one of them says so
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
            print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR) from None
