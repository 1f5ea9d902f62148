"""What a process can tell of its launcher before any group forms."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config import config_args

from bigtrain.runtime import launch
from bigtrain.runtime.launch import processes_asked_for
from tests.launching import ENVIRONMENT, ROOT

BIN = Path(sys.executable).parent
SAYS = "from bigtrain.runtime.launch import processes_asked_for\nprint(processes_asked_for(), 'asked for')\n"
TWO = ["--cpu", "--num_processes", "2"]
DEFAULTS = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"


@pytest.fixture
def parent(monkeypatch):
    """parent(words): fakes a parent of this process with that command line."""
    started = []

    def put(*words):
        waits = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
        started.append(subprocess.Popen([*waits, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        started[-1].stdout.readline()
        monkeypatch.setattr(launch, "PARENT", started[-1].pid)

    yield put
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("words", "defaults", "asked"),
    [
        (["bin/accelerate-launch", *TWO, "script.py"], "", 2),
        (["bin/accelerate", "launch", *TWO, "script.py"], "", 2),
        (["accelerate.commands.launch", "script.py"], DEFAULTS, 2),
        (["accelerate.commands.launch", "--cpu", "script.py"], DEFAULTS, 1),
        (["script.py"], DEFAULTS, 1),
        (["launch", *TWO], "", 1),
    ],
    ids=["script", "command", "its own file", "its own file, not used", "none", "another launch"],
)
def test_processes_asked_for(parent, monkeypatch, tmp_path, words, defaults, asked):
    """The process count set by accelerate's command line or its default config file."""
    file = tmp_path / "default_config.yaml"
    if defaults:
        file.write_text(defaults)
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    monkeypatch.setattr(config_args, "default_yaml_config_file", str(file), raising=False)
    parent(*words)
    assert processes_asked_for() == asked


def test_a_real_launcher_is_recognized(tmp_path):
    """`accelerate launch`, as it is installed, is the parent of what it starts."""
    script, home = tmp_path / "script.py", tmp_path / "home" / "accelerate"
    script.write_text(SAYS)
    home.mkdir(parents=True)
    (home / "default_config.yaml").write_text(DEFAULTS)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HOME": str(home.parent)}
    line = [BIN / "accelerate", "launch", script]
    done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True, timeout=100)
    assert "2 asked for" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("config", "words", "expected"),
    [
        ("ddp", [], True),
        ("multinode", [], True),
        ("ddp", ["--cpu"], False),
        ("cpu2", [], False),
        ("one", [], False),  # on whatever there is
        ("zero2", [], False),  # without a GPU it runs on the CPU, as its file says
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_launch_files_for_gpus(parent, monkeypatch, config, words, expected, joined):
    """A launch file for GPUs is refused where there is none, which would otherwise silently be a CPU run."""
    file = str(ROOT / "recipes" / "accelerate" / f"{config}.yaml")
    named = [f"--config_file={file}"] if joined else ["--config_file", file]
    parent("accelerate.commands.launch", *named, *words, "script.py")
    assert launch.expects_gpus() == expected
    monkeypatch.setattr(launch, "has_gpu", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if expected:
        with pytest.raises(ValueError, match="this launch is for GPUs, and this machine has none"):
            launch.check_launch()
    else:
        launch.check_launch()


def test_threads(monkeypatch, tmp_path):
    """A process takes its share of the cores that are ours, unless OMP_NUM_THREADS says otherwise."""
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setattr(launch, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch.threads_of_process() == 6
    for quota, cores in (("max 100000", 12), ("400000 100000", 4), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert launch.cores() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.threads_of_process() == 3
