"""How every recipe's run begins and ends.

    settings -> checks -> run folder -> data -> networks -> processes -> the recipe's own science -> results.json

Mistakes in a command are reported before anything is written, and before anything slow is imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from bigtrain.data.workers import prepare_workers
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.launch import check_launch, has_gpu, workers_of_process
from bigtrain.runtime.run_folder import RunFolder
from bigtrain.runtime.settings import print_if_asked, read_settings
from bigtrain.text import clock
from bigtrain.training.compiling import check_compiler

if TYPE_CHECKING:
    from bigtrain.choices import Chosen
    from bigtrain.training.run_setup import Setup

C = TypeVar("C")  # the recipe's Config
D = TypeVar("D")  # its data, such as a Split
N = TypeVar("N")  # its networks, loaded


class Result(NamedTuple):
    """What a recipe ends with: the record of results.json, and the last line it prints."""

    record: Mapping[str, Any]
    summary: str
    look_at: str = "report.html"  # The file of the run folder to look at first.


@dataclass(frozen=True)
class Recipe(Generic[C, D, N]):
    """The functions of a recipe, in the order in which `run_recipe` calls them."""

    name: str  # Of its script, without .py.
    config: type[C]
    description: str  # For --help: the recipe's docstring.
    check: Callable[[C], None]
    """Refuse settings that contradict each other or have no effect; reads nothing, imports no torch."""
    read: Callable[[C], D]  # Open the shard sets and say which images are for what.
    load: Callable[[C, D, Chosen], N]  # Load the networks, and refuse what does not fit them.
    train: Callable[[C, Setup, D, N], Result]
    """The science: train, save, judge. What an earlier start has finished is not done again."""
    leaves: Mapping[str, str] = field(default_factory=dict)
    """Its stages in their order, and the file that each leaves in the run folder."""
    settings: Callable[..., Any] = read_settings  # How its settings are read.


def run_recipe(recipe: Recipe[C, D, N], argv: Sequence[str] | None = None) -> None:
    """Begin a run or continue it, and end it; a finished one says so and does nothing."""
    with user_errors(f"{recipe.name}.py"):
        argv = sys.argv[1:] if argv is None else argv
        config = recipe.settings(recipe.config, argv, description=recipe.description)
        print_if_asked(config, argv)
        if not config.train or not config.run.out:
            raise ValueError("--train SHARDS and --out FOLDER are needed: what to train on, and where the run goes.")
        run = RunFolder(config.run.out, config)
        if run.is_already_finished():
            return
        check_launch()
        check_compiler(config.run.compile)
        recipe.check(config)
        data = recipe.read(config)
        began = time.monotonic()
        prepare_workers(workers_of_process(config.run.workers, on_gpu=has_gpu()))
        from bigtrain.runtime.precision import choose_precision

        precision = run.resolved("precision") or choose_precision(config.precision)
        networks = recipe.load(config, data, precision)
        from bigtrain.training.cautions import cautions

        notes = [] if run.has_begun else list(cautions(config, data))
        from bigtrain.training.run_setup import Setup  # imports Accelerate: after errors in the networks

        setup = Setup.begin(run, precision, recipe.leaves)
        for note in notes:
            setup.accelerator.print(f"note: {note}")
        result = recipe.train(config, setup, data, networks)
        setup.finish(result.record)
        took = clock(time.monotonic() - began)
        setup.accelerator.print(f"{result.summary}; this start took {took}; see {run / result.look_at}")
