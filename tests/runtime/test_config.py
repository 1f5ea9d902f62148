"""Settings: their precedence, one sentence for a user error, and the folder that holds one run."""

import json
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest

from bigtrain.files import write_json
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.run_folder import RunFolder, packages
from bigtrain.runtime.settings import RunSettings, overlay, print_if_asked, read_settings, result_settings

TOP = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    known: tuple[str, ...] = ()
    scale: tuple[float, float] = (0.1, 0.3)
    lr: float = 1e-5
    epochs: int = 10
    keep: Literal["attended", "random"] = "attended"
    tune: bool = True
    blocks: Literal[1, 3] = 1
    run: RunSettings = field(default_factory=RunSettings)


@pytest.fixture
def toml(tmp_path):
    def write(text, name="config.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_precedence(toml):
    """Flags override the file, the file overrides the preset, and the preset the defaults."""
    preset = toml("lr = 1\nepochs = 1\nkeep = 'random'\n", "preset.toml")
    file = toml("lr = 2\nepochs = 2\nout = 'a'\nknown = ['x', 'y']\n")
    config = read_settings(Config, ["--config", str(file), "--lr", "3", "--out", "b"], preset)
    assert config == Config(known=("x", "y"), lr=3, epochs=2, keep="random", run=RunSettings(out="b"))
    assert read_settings(Config, [f"--config={file}"], preset).lr == 2
    assert read_settings(Config, [], preset).lr == 1
    assert read_settings(Config, []) == Config()


def test_flags_of_every_kind_are_read():
    flags = [
        "--known",
        "cat",
        "dog",
        "--scale",
        ".2",
        ".4",
        "--no-tune",
        "--blocks",
        "3",
        "--workers",
        "2",
        "--epochs",
        "5",
    ]
    expected = Config(
        known=("cat", "dog"), scale=(0.2, 0.4), tune=False, blocks=3, epochs=5, run=RunSettings(workers=2)
    )
    assert read_settings(Config, flags) == expected


def test_run_group(toml):
    """The group `run` may be a table, or its settings may stand at the top."""
    config = overlay(Config(), toml("log_every = 7\n[run]\nworkers = 3\n"))
    assert config.run == RunSettings(log_every=7, workers=3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epoch = 3", r"no setting 'epoch'; near it: epochs"),
        ("zzz = 3", r"no setting 'zzz'; near it: see --help"),
        ("[run]\nworker = 3", r"no setting 'worker'; near it: workers"),
        ("[run]\nepochs = 3", r"no setting 'epochs'"),
        ("run = 3", r"no setting 'run'"),
        ("epochs = ", r"is not valid TOML"),
        ("epochs = 'ten'", r"epochs is 'ten'; it must be a whole number"),
        ("epochs = 2.5", r"epochs is 2.5; it must be a whole number"),
        ("epochs = true", r"epochs is True; it must be a whole number"),
        ("lr = 'fast'", r"lr is 'fast'; it must be a number"),
        ("tune = 1", r"tune is 1; it must be true or false"),
        ("keep = 'all'", r"keep is 'all'; it must be 'attended' or 'random'"),
        ("blocks = 2", r"blocks is 2; it must be 1 or 3"),
        ("known = 'cat'", r"known is 'cat'; it must be a list of strings"),
        ("known = [1]", r"known is \[1\]; it must be a list of strings"),
        ("scale = [0.1]", r"scale is \[0\.1\]; it must be a list of 2 numbers"),
        ("workers = 'two'", r"workers is 'two'; it must be 'auto' or a whole number"),
    ],
)
def test_wrong_setting(toml, text, sentence):
    """A wrong setting in a file is refused with a sentence that names the file."""
    with pytest.raises(ValueError, match=r"config\.toml.*" + sentence):
        overlay(Config(), toml(text))


def test_a_whole_number_is_also_a_float(toml):
    config = overlay(Config(), toml("lr = 1\nscale = [0, 1]"))
    assert (config.lr, config.scale) == (1, (0, 1))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.toml cannot be read .*--config takes a \.toml file"):
        read_settings(Config, ["--config", str(tmp_path / "none.toml")])
    with pytest.raises(ValueError, match="--config was given without a file"):
        read_settings(Config, ["--config"])


def test_print_config(toml, capsys):
    """The flag `--print-config` prints the settings as JSON and ends."""
    flags = ["--epochs", "4", "--print-config", "--config", str(toml("known = ['a']"))]
    with pytest.raises(SystemExit) as leaving:
        print_if_asked(read_settings(Config, flags), flags)
    assert leaving.value.code == 0
    record = json.loads(capsys.readouterr().out)
    expected = Config(known=("a",), epochs=4)
    assert record == {**result_settings(expected), "run": json.loads(json.dumps(expected.run.__dict__))}


def test_result_settings():
    """A run's folder and number of workers are not settings that affect its result."""
    assert result_settings(Config()) == result_settings(Config(run=RunSettings(out="x", workers=5)))
    assert result_settings(Config(epochs=3)) != result_settings(Config())


def test_user_error(capsys):
    """A user's mistake is one sentence and exit code 2."""
    with pytest.raises(SystemExit) as leaving, user_errors("defend.py"):
        raise ValueError("the cat is no dog.")
    assert leaving.value.code == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "defend.py: error: the cat is no dog.\n")


def test_control_characters(capsys):
    """Control characters in a name from outside do not reach the terminal."""
    with pytest.raises(SystemExit), user_errors("defend.py"):
        raise ValueError("no class \x1b]0;title\x07.")
    assert capsys.readouterr().err == "defend.py: error: no class ?]0;title?.\n"


def test_one_process_speaks(capsys, monkeypatch):
    """Only one process per machine reports an error, and a bug keeps its traceback."""
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit), user_errors("defend.py"):
        raise ValueError("the cat is no dog.")
    assert capsys.readouterr().err == f"defend.py: error (rank 9 on {socket.gethostname()}): the cat is no dog.\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as leaving, user_errors("defend.py"):
        raise ValueError("the cat is no dog.")
    assert (leaving.value.code, capsys.readouterr().err) == (2, "")
    with pytest.raises(TypeError), user_errors("defend.py"):
        raise TypeError("a bug")


def run_of(folder, **changes):
    run = RunFolder(folder, replace(Config(), **changes))
    run.check()
    return run


def test_packages(tmp_path, monkeypatch):
    """Versions are those that importlib reads; of a package that is there twice, the first on the path."""
    assert {name: version(name) for name in packages()} == packages() and "torch" in packages()
    for folder, number in (("first", "9.0"), ("second", "10.0")):
        (tmp_path / folder / f"twice-{number}.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    assert packages()["twice"] == "9.0"


def test_run_folder(tmp_path):
    """A run folder continues with the same settings and refuses others by name."""
    run = run_of(tmp_path / "run", known=("a",))
    run.create()
    written = (tmp_path / "run" / "config.json").read_text()
    assert json.loads(written)["settings"]["known"] == ["a"]
    assert json.loads(written)["packages"] == packages()
    again = run_of(tmp_path / "run", known=("a",), run=RunSettings(workers=4))
    again.create()
    assert (tmp_path / "run" / "config.json").read_text() == written
    with pytest.raises(ValueError) as caught:
        run_of(tmp_path / "run", known=("b",), epochs=11)
    said = str(caught.value)
    assert "known (['a'] there, ['b'] here)" in said
    assert "epochs (10 there, 11 here)" in said
    assert "lr" not in said and "Name another folder" in said


def test_finished_run(tmp_path):
    """A run is finished once it has results, and then keeps no checkpoints."""
    run = run_of(tmp_path / "run")
    run.create()
    (run / "checkpoints" / "distil").mkdir(parents=True)
    assert not run.finished
    run.finish({"auroc": 0.5})
    assert run.finished and json.loads((run / "results.json").read_text()) == {"auroc": 0.5}
    assert not (run / "checkpoints").exists()


def test_folder_of_other_files(tmp_path):
    """A folder of other files is refused as a run, whereas an empty one may serve."""
    run_of(tmp_path)  # an empty one may serve
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files and no run: name a new folder"):
        run_of(tmp_path)


def test_write_json(tmp_path):
    """JSON is written whole or not at all."""
    write_json(tmp_path / "a.json", {"ä": 1})
    before = (tmp_path / "a.json").read_text()
    for wrong in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(tmp_path / "a.json", wrong)
        assert (tmp_path / "a.json").read_text() == before


def test_recipe_print_config(tmp_path):
    """A recipe prints its settings without loading data or weights."""
    command = [sys.executable, TOP / "recipes" / "defend.py", "--print-config", "--train", "nowhere", "--seed", "3"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(TOP)}
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["train"], record["seed"], record["run"]["out"]) == ("nowhere", 3, "")
    assert list(tmp_path.iterdir()) == []
