"""Settings of a recipe: a dataclass, a TOML file underneath, flags on top. Read and checked without importing torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

PRINT_CONFIG = "--print-config"


@dataclass(frozen=True)
class RunSettings:
    """Settings that change the result by rounding at most; every recipe has them as its field `run`."""

    out: str = ""
    """Run folder; the same command again continues in it."""
    workers: int = 0
    """Processes for each rank that read and decode; 0 does it in the training process."""
    threads: int = 0
    """CPU threads of each process; 0: as OMP_NUM_THREADS says, which `accelerate launch` sets to 1 by default."""
    cache_gib: float = 2.0
    """On CPUs, memory of a process and room in the run folder, in GiB, for what each epoch would compute again
    (DEFEND's teacher tokens); 0: compute them in each step."""
    log_every: int = 20
    """Steps between two lines of the log."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints of every so many steps stay too, also when the run is finished; 0: none."""
    resume_from: str = ""
    """A new run begins with the state of another with the same settings: its folder, or one of its checkpoints."""
    accumulate: int = 1
    """Each process takes its share of a batch in so many parts, to save memory."""
    recompute: bool = False
    """Compute activations again in the backward pass instead of keeping them (activation checkpointing)."""
    compile: bool = False
    """torch.compile the trained network."""
    deterministic: bool = True
    """On a GPU: kernels that add up in a fixed order, so that a run that is repeated has the same bits."""
    max_skipped_steps: int = 3
    """So many steps in a row whose loss or gradient is not finite stop the run."""
    hang_timeout_min: float = 30.0
    """When no process has got on for so long, all of them stop, naming the one that the others wait for."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Where figures also go, beside log.jsonl and TensorBoard; `uv sync --extra wandb` and so on installs them."""
    peak_tflops: float = 0.0
    """What a device can do at most, for mfu_percent; 0: known for common GPUs."""


C = TypeVar("C")
Limits = dict[str, tuple[float, float]]
RUN_LIMITS: Limits = {
    **dict.fromkeys(("workers", "threads", "cache_gib"), (0, math.inf)),
    "log_every": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "keep_checkpoints": (1, math.inf),
    "keep_every": (0, math.inf),
    "accumulate": (1, math.inf),
    "max_skipped_steps": (1, math.inf),
    "hang_timeout_min": (0.01, 1e6),
    "peak_tflops": (0, math.inf),
}


def read_settings(
    config_class: type[C], argv: Sequence[str], preset: Path | None = None, *, description: str | None = None
) -> C:
    """Defaults, then `preset`, then `--config FILE.toml`, then flags."""
    import tyro  # here: a process that only reads pictures imports the recipe too

    arguments = [argument for argument in argv if argument != PRINT_CONFIG]
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
        description=(description or "").strip()
        + "\n\n--config FILE.toml: settings underneath the flags.  --print-config: show the settings as JSON and end.",
    )
    check_ranges(config.run, RUN_LIMITS)
    return config


def print_if_asked(config: Any, argv: Sequence[str]) -> None:
    """With `--print-config` among the flags, print the resolved settings as JSON and end."""
    if PRINT_CONFIG in argv:
        print(json.dumps(dataclasses.asdict(config), indent=1))
        raise SystemExit(0)


def check_ranges(config: Any, limits: Limits) -> None:
    """Refuse settings outside of (lowest, highest); a pair must lie inside, and rise."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else (value,)
        if not all(low <= v <= high for v in values):
            reach = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {reach}.")
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; the first must not be above the second.")


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
