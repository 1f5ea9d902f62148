"""What is said while many images are worked on."""

import sys

import pytest

from bigtrain import progress
from bigtrain.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds of a clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def at(seconds):
        now[0] = seconds

    return at


def test_lines_without_a_terminal(clock, capsys):
    """At most a line every ten seconds: name, count, speed and time left; what was there before adds no speed."""
    with Progress(1000, "features of letters") as shown:
        clock(5)
        shown.add(400, is_new=False)
        assert capsys.readouterr().err == ""
        clock(10)
        shown.add(200)
        clock(19)
        shown.add(50)
        clock(20)
        shown.add(150)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "features of letters: 600 of 1000 images, 20 images/s, 0:20 left"
    assert second == "features of letters: 800 of 1000 images, 20 images/s, 0:10 left"


def test_bytes_slow_work_and_no_total(clock, capsys):
    """Bytes get a rate too, low rates are shown with decimals, and without a total no remaining time is shown."""
    shown = Progress(0)
    clock(100)
    shown.add(25, 50_000_000)
    assert capsys.readouterr().err == "25 images, 0.25 images/s, 0.5 MB/s\n"


def test_only_one_rank_speaks(clock, capsys):
    """A progress that is not shown still counts, but prints nothing, not even on a terminal."""
    shown = Progress(10, is_shown=False)
    clock(60)
    shown.add(10)
    assert shown.done == 10 and capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(clock, monkeypatch, capsys):
    """On a terminal there is a bar, and other lines go above it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(4, "features") as shown:
        shown.add(1, is_new=False)
        shown.add(3)
        shown.say("skipped a.jpg")
    said = capsys.readouterr().err
    assert "features" in said and "4/4" in said and "skipped a.jpg\n" in said


def test_lines_of_several_processes(clock, monkeypatch, capsys):
    """Without a bar, a process on a terminal still says how far it is."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(4, "local KNFST", has_bar=False) as shown:
        clock(10)
        shown.add(2)
    assert capsys.readouterr().err == "local KNFST: 2 of 4 images, 0.20 images/s, 0:10 left\n"
