"""What a process can tell of its launcher before any group forms."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SAYS = "from bigtrain.runtime.launch import processes_asked_for\nprint(processes_asked_for(), 'asked for')\n"
TWO = ["--cpu", "--num_processes", "2"]
DEFAULTS = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"


@pytest.mark.parametrize(
    ("launcher", "defaults", "asked"),
    [
        ([BIN / "accelerate-launch", *TWO], "", 2),
        ([BIN / "accelerate", "launch", *TWO], "", 2),
        ([sys.executable, "-m", "accelerate.commands.launch"], DEFAULTS, 2),
        ([sys.executable, "-m", "accelerate.commands.launch", "--cpu"], DEFAULTS, 1),
        ([sys.executable], DEFAULTS, 1),
    ],
    ids=["script", "command", "its own file", "its own file, not used", "none"],
)
def test_how_many_processes_accelerate_was_asked_for(tmp_path, launcher, defaults, asked):
    script, home = tmp_path / "script.py", tmp_path / "home" / "accelerate"
    script.write_text(SAYS)
    home.mkdir(parents=True)
    if defaults:
        (home / "default_config.yaml").write_text(defaults)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "XDG_"))}
    environment |= {"PYTHONPATH": str(TOP), "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(home.parent)}
    done = subprocess.run(
        list(map(str, [*launcher, script])), env=environment, capture_output=True, text=True, timeout=100
    )
    assert f"{asked} asked for" in done.stdout, done.stderr
