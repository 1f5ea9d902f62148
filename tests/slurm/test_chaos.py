"""A sweep whose nodes repeatedly lose power ends with the same table as an undisturbed one."""

import json
import random
import subprocess
import time

import pytest

from tests.launching import ENVIRONMENT, ROOT
from tests.slurm.cluster_commands import BIN, RECIPE, ask, events, slurm

CLASSES = ["ankle_boot", "bag", "dress", "sandal", "trouser"]
LIMIT_S = 3600


def table(folder):
    line = [BIN / "bigtrain", "tables", folder]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, check=True).stdout


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_under_failing_nodes(shards, tmp_path, power):
    text = f"""
recipe = {json.dumps(RECIPE)}
protocol = "uni-class"
classes = {json.dumps(CLASSES)}
seeds = [0, 1]
[settings]
train = {json.dumps(str(shards / "train"))}
test = {json.dumps(str(shards / "test"))}
teacher = {json.dumps(str(ROOT / "recipes/presets/fashion/teacher/teacher.safetensors"))}
image_size = 32
crop_size = 16
train_limit = 300
tune_epochs = 1
tune_batch = 32
tune_lr = 1e-4
head_lr = 1e-3
distil_epochs = 12
distil_batch = 16
distil_lr = 1e-3
schedule = "cosine"
checkpoint_every = 10
"""
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    for folder in (calm, stormy):
        folder.with_suffix(".toml").write_text(f"out = {json.dumps(str(folder))}\n{text}")
    slurm("sweep", calm.with_suffix(".toml"), "--local")

    chance, failures, began = random.Random(0), 0, time.monotonic()
    nodes = sorted(set(ask("sinfo -h -N -o %N").split()))
    slurm("sweep", stormy.with_suffix(".toml"))
    while "10 runs: 10 done" not in (said := slurm("status", stormy)):
        assert "failed" not in said and time.monotonic() < began + LIMIT_S, said
        time.sleep(chance.uniform(5, 20))
        power.off(chance.choice(nodes))
        failures += 1
        time.sleep(chance.uniform(1, 10))
        power.all_on()

    runs = [stormy / f"{name}-s{seed}" for name in CLASSES for seed in (0, 1)]
    started = sum(row["event"] == "started" for run in runs for row in events(run))
    print(f"\n{failures} failures of a node, {started} attempts of 10 runs\n{table(stormy)}")
    assert started > len(runs)
    assert table(stormy) == table(calm)
    for run in runs:
        assert (run / "scores.parquet").read_bytes() == (calm / run.name / "scores.parquet").read_bytes(), run.name
