"""Cluster files, what sbatch gets for them, and what its refusals mean; no SLURM is asked."""

import re
import sys
from pathlib import Path

import pytest

from slurm.cluster import Cluster, read_cluster
from slurm.refusals import explained
from slurm.scheduler import script
from tests.launching import ROOT
from tests.slurm.cluster_commands import RECIPE, slurm

GOLDEN = Path(__file__).parents[1] / "golden"
SHIPPED = sorted((ROOT / "slurm" / "clusters").glob("*.toml"))


@pytest.mark.parametrize(
    "name, asked, further",
    [
        ("cpu", Cluster(), {}),
        ("array", Cluster(partition="low", mem_gb=1.5), {"runs": 6, "parallel": 2, "after": ["12", "13"]}),
        ("a100x8", read_cluster(ROOT / "slurm" / "clusters" / "a100x8.toml").changed("", nodes=4), {}),
        (
            "everything",
            Cluster(
                partition="gpu", account="vision", qos="long", nodes=2, gpus_per_node=8, cpus_per_task=12, mem_gb=960,
                timeout_min=1440, signal_delay_s=300, setup=("module load cuda", "export A='b c'"),
                container="/images/a b.sqsh", container_mounts="/data:/data", constraint="ib", exclude="node7",
            ),
            {},
        ),
    ],
)  # fmt: skip
def test_sbatch_script(name, asked, further):
    """What sbatch gets."""
    text = script(asked, Path('/shared/it\'s a "$(run)"/slurm'), "dog s0;", **further)
    text = text.replace(sys.executable, "/env/bin/python")
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("file", SHIPPED, ids=[file.name for file in SHIPPED])
def test_shipped_cluster_files(file):
    """The cluster files that are shipped are valid."""
    assert read_cluster(file).processes >= 1


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("gpu_per_node = 8", "there is no setting 'gpu_per_node'; near it: gpus_per_node"),
        ("nodes = 0", "nodes is 0; it must be at least 1."),
        ("nodes = true", "nodes is True; it must be a whole number."),
        ('partition = ["a"]', "partition is ['a']; it must be a string."),
        ('setup = "module load"', "setup is 'module load'; it must be a list of strings."),
        ('strategy = "fsdp"', "strategy is 'fsdp'; it must be 'ddp' or 'zero1' or 'zero2' or 'zero3'."),
        ("gpus_per_node = 2\ntasks_per_node = 2", "tasks_per_node is for nodes without GPUs"),
        ("timeout_min = 2\nsignal_delay_s = 120", "it must be less than timeout_min, 120 s"),
        ("nodes = ", "is not valid TOML"),
    ],
)
def test_wrong_cluster_file(tmp_path, text, sentence):
    """An invalid cluster file is reported."""
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as told:
        read_cluster(file)
    assert str(file) in str(told.value)


def test_missing_cluster_file(tmp_path):
    """A cluster file that is not there is told."""
    with pytest.raises(ValueError, match=r"cannot be read .No such file or directory.: name a cluster file"):
        read_cluster(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "word, line",
    [
        ("invalid partition specified: nowhere", "#SBATCH --partition=nowhere"),
        ("Invalid account or account/partition combination specified", "#SBATCH --account=vision"),
        ("Invalid qos specification", "#SBATCH --qos=long"),
        ("Memory specification can not be satisfied", "#SBATCH --mem=1024MB"),
        ("Invalid feature specification", "#SBATCH --constraint=ib"),
        ("Requested node configuration is not available", "#SBATCH --gpus-per-node=9"),
    ],
)
def test_refusal_by_sbatch(word, line):
    """A refusal is reported with its explanation."""
    asked = Cluster(partition="nowhere", account="vision", qos="long", mem_gb=1, constraint="ib", gpus_per_node=9)
    said = f"sbatch: error: {word}\nsbatch: error: Batch job submission failed: {word}\n"
    told = explained(said, script(asked, Path("/x"), "x"), lambda: " There is low.")
    assert told.startswith(f"sbatch refuses the job: {word}. The line") and line in told and "\n" not in told


def test_without_slurm(tmp_path):
    """Without SLURM the error message names the alternative."""
    said = slurm("submit", RECIPE, "--", "--out", tmp_path / "run", fails=2, PATH="/nowhere")
    assert said.startswith("bigtrain-slurm: error: there is no SLURM here (sbatch, srun, squeue, scontrol not on the")
    assert "--local" in said and not (tmp_path / "run").exists()
