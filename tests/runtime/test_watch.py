"""The live page: what it says of a run in each state, and that no log can break it."""

import json
import os
import subprocess
import sys
import threading
import time
from io import StringIO

import pytest
from rich.console import Console

from bigtrain.runtime.follow_log import Follower, LoggedStage
from bigtrain.runtime.watch import curve, shown, watch
from bigtrain.text import clean


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def add(run, *rows):
    with (run / "log.jsonl").open("a") as file:
        file.write("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def row(step, loss=1.0, stage="tune", at=None, **more):
    return {"stage": stage, "step": step, "steps": 10, "time": at or time.time(), "loss": loss, **more}


def paged(run, width=100):
    console = Console(file=StringIO(), width=width)
    watch(run, console=console)
    return console.file.getvalue()


def test_running_stage(run):
    """A running stage shows its progress, figures and curve."""
    add(run, row(1, 4.0), row(2, 2.0), row(3, 0.5, images_per_s=72.4, data_wait_percent=3.0, left_s=75.2))
    said = paged(run)
    for what in ("running", "tune", "3 of 10", "1:15 left", "loss 0.5", "72 images/s", "waits for data 3 %"):
        assert what in said, what
    assert "█▄▁" in said and "0.5 to 4" in said


def test_curve():
    """The curve fits into the width and keeps its ends."""
    stage = LoggedStage("tune")
    stage.losses.extend((n, 1000 - n) for n in range(1000))
    for width in (40, 100):
        line = curve(stage, width).plain
        assert len(line) <= width
        assert line.count("█") >= 1 and line.count("▁") >= 1


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        (
            "results.json",
            '{"auroc": {"value": 0.961, "low": 0.939, "high": 0.975}}',
            "AUROC 0.961 (95 % interval 0.939 to",
        ),
        ("results.json", '{"top1": 0.5}', "finished: top-1 0.500"),
        ("results.json", "broken", "finished"),
        ("stopped.json", "{}", "stopped on request; the same command continues"),
    ],
)
def test_a_run_that_has_ended_says_how(run, file, text, says):
    add(run, row(10))
    (run / file).write_text(text)
    assert says in paged(run)


def test_failed_or_silent(run):
    """The page says so where a run has not begun, is silent or has failed."""
    assert "has not begun a stage yet" in paged(run)
    add(run, row(1, at=time.time() - 500), row(2, at=time.time() - 490))
    assert "no news for 8:1" in paged(run)
    add(run, {"stage": "tune", "step": 3, "time": time.time(), "event": "failed", "text": "the loss is not finite"})
    assert "failed: the loss is not finite" in paged(run)


def test_garbage_in_log(run):
    """Garbage in the log breaks nothing and is not taken for markup."""
    evil = "\x1b[31mred[bold]"
    add(run, "garbage\n", "[1, 2]\n", "null\n", "{}\n", '{"stage": "tune", "step": 1, "time": 1, "loss": NaN}\n')
    add(run, '{"stage": "tune", "step": Infinity, "time": 1}\n', '{"stage": "tune", "step": 2, "time": NaN}\n')
    add(run, row(2, "high", stage=evil, steps="many", left_s="soon", lr=None, time="never"))
    add(run, row(2, True, stage=evil, steps=None, left_s=float("inf")), '{"stage": "tune", "st')
    said = paged(run)
    assert "\x1b" not in said and "[31mred[bold]" in said
    assert clean("a\x07b\n") == "a?b\n"


def test_follower(run):
    """Only new log rows are read, partial ones once complete; a replaced log is read from the start."""
    follower = Follower(run / "log.jsonl")
    follower.look()  # there is none yet
    add(run, row(1), json.dumps(row(2))[:20])
    follower.look()
    assert follower.newest.step == 1
    add(run, json.dumps(row(2))[20:] + "\n", row(3))
    follower.look()
    assert [step for step, _ in follower.newest.losses] == [1, 2, 3]
    (run / "other").write_text(json.dumps(row(1)) + "\n")
    (run / "other").replace(run / "log.jsonl")
    follower.look()
    assert [step for step, _ in follower.newest.losses] == [1]


def test_live_page(run):
    """A page on a terminal follows the run to its end."""
    console = Console(file=StringIO(), width=80, force_terminal=True)
    add(run, row(1))

    def go_on():  # once the page shows the step before, however busy the machine is
        until_shown("1 of 10")
        add(run, row(7))
        until_shown("7 of 10")
        (run / "results.json").write_text("{}")

    def until_shown(step):
        while step not in console.file.getvalue():
            time.sleep(0.01)

    threading.Thread(target=go_on).start()
    watch(run, every_s=0.05, console=console)
    said = console.file.getvalue()
    assert "1 of 10" in said and "7 of 10" in said and "finished" in said.rpartition("7 of 10")[0]


def test_dumb_terminal(run):
    """A terminal that cannot move its cursor gets one page."""
    console = Console(file=StringIO(), width=80, force_terminal=True, _environ={"TERM": "dumb"})
    add(run, row(1))
    watch(run, every_s=60, console=console)
    assert "1 of 10" in console.file.getvalue()


def command(*arguments, **variables):
    environment = {**os.environ, "COLUMNS": "80", **variables}
    line = [sys.executable, "-m", "bigtrain.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("watch", "nowhere"), "nowhere is not a run: name the folder"),
        (("watch", "RUN", "--every", "0"), "--every is 0.0; it must be above 0 seconds"),
        (("watch", "RUN", "--every", "nan"), "--every is nan"),
        (("watch", "RUN", "--every", "soon"), "invalid float value"),
        ((), "the following arguments are required: command"),
    ],
)
def test_cli_mistake(run, arguments, says):
    """A mistake on the command line gets a sentence and exit code 2."""
    done = command(*(run if argument == "RUN" else argument for argument in arguments))
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_without_terminal(run):
    """Without a terminal one page is printed, and torch is not imported."""
    add(run, row(1))
    done = command("watch", run)
    assert done.returncode == 0 and "1 of 10" in done.stdout
    assert "1 of 10" in command("watch", run, PYTHONIOENCODING="ascii").stdout
    imports = subprocess.run(
        [sys.executable, "-c", "import bigtrain.cli, sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert imports.stdout == "False\n", imports.stderr


def test_figures_are_said_in_words():
    numbers = {"loss": 0.1234, "images_per_s": 71.6, "gradient_norm": 2.0}
    assert shown(numbers) == "loss 0.1234  72 images/s  gradient norm 2"


def test_ahead_of_the_rows(run):
    """The page shows the step that the run is at, and not that of a start before a restart."""
    add(run, row(1))
    for at, step in ((time.time() + 1, 5), (0.0, 1)):
        (run / "progress.json").write_text(json.dumps({"stage": "tune", "step": 5, "steps": 10, "time": at}))
        follower = Follower(run / "log.jsonl")
        follower.look()
        assert follower.newest.step == step
