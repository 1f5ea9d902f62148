"""Sweeps on a real SLURM, with names that a shell would take for something else."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from shards.shards_cli import main as shards_command
from tests.slurm.cluster_commands import COUNTING, RECIPE, events, slurm, submitted, until, until_done

CLASSES = ["it's $(touch gone)", 'a "b" `c`; d', "plain"]


@pytest.fixture
def folder(tmp_path, teacher):
    """A folder whose name has all that shells care for, with shards of classes of such names in it."""
    place = tmp_path / 'it\'s a "sweep" & more'
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (place / "photos" / split / name).mkdir(parents=True)
            for number in range(20):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "photos" / split / name / f"{number}.png")
        build = ["build", "folder", "--root", place / "photos" / split, "--out", place / split, "--workers", "1"]
        assert shards_command(list(map(str, build))) == 0
    (place / "many.toml").write_text(
        f"""
recipe = {json.dumps(RECIPE)}
out = "runs/many $x"
protocol = "uni-class"
seeds = [0]
[settings]
train = "train"
test = "test"
teacher = {json.dumps(str(teacher))}
tune = false
image_size = 32
crop_size = 16
distil_epochs = 2
distil_batch = 6
"""
    )
    return place


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_array(folder):
    """An array of three runs with names that shells care for."""
    said = slurm("sweep", "many.toml", cwd=folder)
    array = submitted(said)
    assert f"job {array}: 3 runs" in said
    runs = sorted(path for path in (folder / "runs" / "many $x").iterdir() if path.name != "slurm" and path.is_dir())
    assert len(runs) == 3 and all(re.fullmatch(r"[\w.+=-]+", run.name, re.ASCII) for run in runs)
    assert "3 runs: " in slurm("status", "runs/many $x", cwd=folder)
    assert "0 to run" in slurm("sweep", "many.toml", cwd=folder)
    until_done(*runs)
    assert {row["job"].split("_")[0] for run in runs for row in events(run)} == {array}
    known = {json.loads((run / "results.json").read_text())["known"][0] for run in runs}
    assert known == set(CLASSES)
    assert not list(folder.rglob("gone"))
    until(lambda: "3 runs: 3 done" in slurm("status", "runs/many $x", cwd=folder), "status", 30)
    assert "0 to run" in slurm("sweep", "many.toml", cwd=folder)


@pytest.mark.slurm
def test_refused_by_sbatch(tmp_path, cluster):
    """What sbatch refuses is told with the line behind it."""
    flags = ["--", "--out", tmp_path / "run"]
    said = slurm("submit", COUNTING, "--partition", "nowhere", *flags, fails=2)
    assert "sbatch refuses the job: invalid partition specified: nowhere." in said
    assert "#SBATCH --partition=nowhere" in said and "There is " in said and "Traceback" not in said
    said = slurm("submit", COUNTING, "--gpus-per-node", "99", *flags, fails=2)
    assert "gpus_per_node is 99, and a node of the default partition has at most " in said and "There is " in said
    assert not (tmp_path / "run").exists()
    assert not cluster()
