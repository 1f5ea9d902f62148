"""Sweeps on a real SLURM, with names that a shell would take for something else."""

import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.slurm.conftest import BIN, RECIPE, events, slurm, submitted, until, until_done

CLASSES = ["it's $(touch gone)", 'a "b" `c`; d', "plain"]


@pytest.fixture
def folder(tmp_path, small):
    """A folder whose name has all that shells care for, with shards of classes of such names in it."""
    place = tmp_path / 'it\'s a "sweep" & more'
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (place / "photos" / split / name).mkdir(parents=True)
            for number in range(20):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "photos" / split / name / f"{number}.png")
        build = [BIN / "bigtrain-shards", "build", "folder", "--root", place / "photos" / split, "--out", place / split]
        subprocess.run(list(map(str, build)), check=True, capture_output=True)
    teacher = small[small.index("--teacher") + 1]
    (place / "many.toml").write_text(
        f"""
recipe = {json.dumps(RECIPE)}
out = "runs/many $x"
protocol = "uni-class"
seeds = [0, 1]
[settings]
train = "train"
test = "test"
teacher = {json.dumps(teacher)}
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
def test_an_array_of_six_with_names_that_shells_care_for(folder):
    said = slurm("sweep", "many.toml", cwd=folder)
    array = submitted(said)
    assert f"job {array}: 6 runs" in said
    runs = sorted(path for path in (folder / "runs" / "many $x").iterdir() if path.name != "slurm" and path.is_dir())
    assert len(runs) == 6 and all(re.fullmatch(r"[\w.+=-]+", run.name, re.ASCII) for run in runs)
    assert "6 runs: " in slurm("status", "runs/many $x", cwd=folder)
    assert "0 to run" in slurm("sweep", "many.toml", cwd=folder)
    until_done(*runs)
    assert {row["job"].split("_")[0] for run in runs for row in events(run)} == {array}
    known = {json.loads((run / "results.json").read_text())["known"][0] for run in runs}
    assert known == set(CLASSES)
    assert not list(folder.rglob("gone"))
    until(lambda: "6 runs: 6 done" in slurm("status", "runs/many $x", cwd=folder), "status", 30)
    assert "0 to run" in slurm("sweep", "many.toml", cwd=folder)


@pytest.mark.slurm
def test_what_sbatch_refuses_is_told_with_the_line_behind_it(small, tmp_path, cluster):
    flags = ["--", *small, "--out", tmp_path / "run"]
    said = slurm("submit", RECIPE, "--partition", "nowhere", *flags, fails=2)
    assert "sbatch refuses the job: invalid partition specified: nowhere." in said
    assert "#SBATCH --partition=nowhere" in said and "There is " in said and "Traceback" not in said
    said = slurm("submit", RECIPE, "--gpus-per-node", "99", *flags, fails=2)
    assert "gpus_per_node is 99, and a node of the default partition has at most " in said and "There is " in said
    assert not (tmp_path / "run").exists()
    assert not cluster()
