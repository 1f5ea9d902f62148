"""A loss or gradient that is not finite on any rank: the step is skipped on all, and too many in a row end the run."""

import json

import pytest

from bigtrain.models import network as networks
from bigtrain.training.update import NO_GRADIENT, NO_LOSS
from recipes import defend
from tests.launching import run as started
from tests.runs import events

LAUNCHES = {
    "one process": {"config": "cpu"},
    "two": {"config": "cpu2", "processes": 2},
    "ZeRO-2": {"config": "zero2", "processes": 2},
    "ZeRO-3": {"config": "zero3", "processes": 2},
}


@pytest.mark.parametrize("launch", ["one process", "two", "ZeRO-2"])
def test_three_in_a_row(small, tmp_path, launch):
    """Three bad steps in a row end the run, which names them and the last good checkpoint."""
    run = tmp_path / "run"
    bad = "--no-tune --distil-lr 1e20 --checkpoint-every 1"  # the first step throws the weights away
    flags = [*small, *bad.split(), "--out", run]
    for number in range(2):
        done = started("defend.py", *flags, **LAUNCHES[launch])
        assert done.returncode == 2
        errors = [row for row in done.stderr.splitlines() if row.startswith("defend.py: error:")]
        says = f"the loss is not finite in 3 steps in a row, 2 to 4 of distil; their pictures are in {run}"
        assert errors and says in errors[0], done.stderr[-3000:]
        assert f"the last good checkpoint is {run}/checkpoints/distil/step-000001" in errors[0]
        assert ("continuing from" in done.stdout) == (number == 1)
    skipped = events(run, "step skipped")
    assert [row["step"] for row in skipped] == [2, 3, 4]  # a start drops the rows from its first step on
    assert all(len(set(row["keys"])) == 6 for row in skipped)  # those of all ranks


SCRIPT = """
import sys
import numpy as np, torch
from torch import nn
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Resized
from bigtrain.models.network import normalised
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.settings import RunSettings
from bigtrain.runtime.run_folder import RunFolder
from recipes.pretrain import Config
from bigtrain.training.run_setup import Setup
from bigtrain.training.stage import Stage

class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf

def main():  # what was trained is let go of before the processes part, as in the recipes
    out, shards = sys.argv[1:]
    settings = RunSettings(out=out, log_every=1, checkpoint_every=2, keep_checkpoints=9)
    setup = Setup.begin(RunFolder(out, Config(run=settings)), "fp32", {})
    shard_set = ShardSet(shards)
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    stage = Stage(
        "train", setup, trained=net, optimizer=torch.optim.AdamW(net.parameters(), lr=0.1),
        stream=setup.stream(shard_set, shard_set.plan(np.arange(48), 8), Resized(8)), steps=6,
    )
    rank, ranks = setup.accelerator.process_index, setup.accelerator.num_processes
    for step in stage:
        for batch in step.parts():
            x_B3 = normalised(batch.views["image"], (0.5,) * 3, (0.5,) * 3).mean((2, 3))
            loss = batch.mean(stage.module(x_B3)[:, 0].square(), ranks)
            if (stage.step, rank) == (1, ranks - 1):
                loss = loss * torch.nan
            if (stage.step, rank) == (3, 0):
                loss = InfiniteGradient.apply(loss)
            step.backward(loss)
        step.update()

with user_errors("script.py"):
    main()
"""


@pytest.mark.parametrize("launch", ["two", "ZeRO-2", "ZeRO-3"])
def test_skip_on_all_ranks(shards, tmp_path, launch):
    """A bad loss or gradient of one rank skips the step on all, and training goes on."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = tmp_path / "run"
    done = started(script, run, shards / "train", **LAUNCHES[launch])
    assert done.returncode == 0, done.stderr[-3000:]
    skipped = events(run, "step skipped")
    assert [(row["step"], row["text"]) for row in skipped] == [(2, NO_LOSS), (4, NO_GRADIENT)]
    assert all(len(set(row["keys"])) == 8 for row in skipped)
    # none behind a step that was skipped: the next good one's is saved instead
    saved = sorted(path.name for path in (run / "checkpoints" / "train").iterdir())
    assert saved == ["step-000003", "step-000005", "step-000006"]
    rows = [json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[1] == "nan" and all(isinstance(loss, float) for loss in losses[2:])


def test_queue_stays_finite(small, tmp_path, monkeypatch):
    """A token that is not finite spoils one step and not the queue."""
    steps = 0

    def second_is_nan(image, *further):
        nonlocal steps
        steps += len(image) == 6  # the batch of a step, whole; crops and what is looked at before are others
        return normalised(image, *further) * (float("nan") if steps == 2 and len(image) == 6 else 1)

    normalised = networks.normalised
    monkeypatch.setattr(networks, "normalised", second_is_nan)
    run = tmp_path / "run"
    defend.main([*small, "--queue", "64", "--tune-epochs", "2", "--out", str(run)])
    assert [(row["stage"], row["step"]) for row in events(run, "step skipped")] == [("tune", 2)]
