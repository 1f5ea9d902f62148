"""Settings of a recipe: a dataclass, a TOML file underneath, flags on top. Read and checked without importing torch."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from bigtrain.choices import RANGE, CacheDtype, Compile, Tracker, Workers, check_ranges, checked_values, reach, setting
from bigtrain.files import read_toml

PRINT_CONFIG = "--print-config"

C = TypeVar("C")


@dataclass(frozen=True)
class RunSettings:
    """Settings that change the result by rounding at most; every recipe has them as its field `run`."""

    out: str = ""  # Run folder; the same command again continues in it.
    workers: Literal["auto"] | int = setting("auto", 0)
    """Processes of each rank that read and decode; 0: the training process does. auto: on GPUs all but one of the cores
    that are this rank's, at most 16; on CPUs a quarter of them, at most 4."""
    threads: int = setting(0, 0)
    """CPU threads of each process; 0: OMP_NUM_THREADS, which `accelerate launch` sets to 1 by default, else the cores
    that this process may use, by affinity and control group, divided among the processes of this machine."""
    cache_dir: str = ""
    """Where resized views and DEFEND's teacher tokens are kept for later epochs: a folder that runs share, on a fast
    disk of each machine; empty: in the run folder until it is finished, tokens on CPUs only."""
    cache_gib: float = setting(16.0, 0)  # The most GiB that a run's views take, and its tokens; 0: none are kept.
    cache_dtype: CacheDtype = "auto"
    """How tokens are kept; auto: exactly with --precision fp32, else in bf16. int8 takes half of it again."""
    log_every: int = setting(20, 1)  # Steps between two lines of the log.
    checkpoint_every: int = setting(200, 1)  # Steps between two checkpoints.
    keep_checkpoints: int = setting(2, 1)  # How many of the newest checkpoints are kept.
    keep_every: int = setting(0, 0)
    """Also keep every checkpoint at a multiple of this many steps, even when the run is finished; 0: none."""
    resume_from: str = ""
    """Start a new run from the state of another with the same settings: its folder, or one of its checkpoints."""
    accumulate: int = setting(1, 1)  # Each process computes its slice of a batch in this many parts, to save memory.
    recompute: bool = False
    """Activation checkpointing: compute activations again in the backward pass instead of keeping them."""
    compile: Compile = "auto"
    """torch.compile the networks of a stage. auto: on a GPU, for stages of 1000 steps or more; the first steps then
    take up to some minutes, and less when they were compiled before."""
    deterministic: bool = True
    """On a GPU: kernels that add up in a fixed order, so that a repeated run has the same bits."""
    max_skipped_steps: int = setting(3, 1)
    """Stop the run after this many steps in a row whose loss or gradient is not finite."""
    hang_timeout_min: float = setting(30.0, 0.01, 1e6)
    """When no process has made progress for this long, all exit and name the one that the others wait for."""
    trackers: tuple[Tracker, ...] = ()
    """Where figures also go, beside log.jsonl and TensorBoard; `uv sync --extra wandb` and so on installs them."""
    peak_tflops: float = setting(0.0, 0)  # The device's peak, for mfu_percent; 0: known for common GPUs.


def read_settings(
    config_class: type[C], argv: Sequence[str], preset: Path | None = None, *, description: str | None = None
) -> C:
    """Defaults, then `preset`, then `--config FILE.toml`, then flags."""
    import tyro  # here: a worker that only reads images imports the recipe too

    show_ranges(config_class)
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
    check_ranges(config)
    return config


def print_if_asked(config: Any, argv: Sequence[str]) -> None:
    """With `--print-config` among the flags, print the resolved settings as JSON and end."""
    if PRINT_CONFIG in argv:
        print(json.dumps(dataclasses.asdict(config), indent=1))
        raise SystemExit(0)


def show_ranges(config_class: type) -> None:
    """Let --help print each setting's range, by annotations that tyro reads."""
    import tyro

    for owner in (*config_class.__mro__, RunSettings):
        for name in inspect.get_annotations(owner):
            field = owner.__dict__.get("__dataclass_fields__", {}).get(name)
            if field is not None and RANGE in field.metadata:
                kind = get_type_hints(owner)[name]
                words = ["AUTO|INT"] if kind == Workers else [k.__name__.upper() for k in (get_args(kind) or (kind,))]
                metavar = f"{' '.join(words)}, {reach(*field.metadata[RANGE])}"
                owner.__annotations__[name] = Annotated[kind, tyro.conf.arg(metavar=metavar)]


def overlay(config: C, path: Path) -> C:
    """Settings of a TOML file over a config; tables are nested groups, and names may also stand at the top."""
    given = read_toml(path, "--config takes a .toml file of settings")
    own_kinds, run_kinds = get_type_hints(type(config)), get_type_hints(RunSettings)
    del own_kinds["run"]
    flat = {key: value for key, value in given.items() if key != "run"}
    run = {key: flat.pop(key) for key in list(flat) if key in run_kinds}
    group = given.get("run", {})
    run |= group if isinstance(group, dict) else {"run": group}
    flat, run = checked_values(str(path), flat, own_kinds | run_kinds), checked_values(str(path), run, run_kinds)
    return dataclasses.replace(config, **flat, run=dataclasses.replace(config.run, **run))  # type: ignore[type-var,attr-defined]


def result_settings(config: Any) -> dict[str, Any]:
    """The settings that change the result, as plain JSON values."""
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    record.pop("run")
    return record
