"""A SLURM job on a GPU is asked to stop, resumes, and ends with the bits of an undisturbed run on that GPU."""

import pytest
import torch

from tests.slurm.cluster_commands import (
    RECIPE,
    ask,
    same_bits,
    slurm,
    submitted,
    until_attempt,
    until_done,
    until_training,
    whys,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slurm,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_goes_on_to_the_same_bits(long_run, tmp_path, strategy):
    """A job on a GPU that is told to leave goes on to the bits of a quiet run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = ["--gpus-per-node", "1", "--strategy", strategy, "--", *long_run, "--precision", "bf16", "--out"]
    slurm("submit", RECIPE, "--local", *flags, whole, CUDA_VISIBLE_DEVICES="0")
    job = submitted(slurm("submit", RECIPE, *flags, run, CUDA_VISIBLE_DEVICES=""))
    until_training(run)
    ask(f"scancel --signal=USR2 {job}")
    until_attempt(run, 2)
    until_done(run)
    assert whys(run) == ["asked to stop (SIGUSR2)"]
    said = "".join(log.read_text() for log in (run / "slurm").glob(f"{job}_0_log.out*"))
    assert "on cuda, precision bf16" in said
    assert same_bits(run, whole)
