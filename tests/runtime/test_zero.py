"""DeepSpeed on two CPU processes: DDP's losses, whole weights and moments, and steps that are skipped."""

import json

import pytest

from tests.launching import run
from tests.made_once import made_once

SCRIPT = """
import json, sys, torch
from pathlib import Path
from torch import nn
from bigtrain.runtime import zero
from bigtrain.runtime.checkpoint import Checkpoints
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.start import start
from bigtrain.training.update import PROBLEMS, Update

def network(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 501), nn.Linear(501, 3))
    net[0].bias.requires_grad_(False)
    net.register_buffer("kept", torch.full((3,), float(seed)))
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim < 2]}]
    return net, torch.optim.AdamW(groups, lr=1e-2)

def prepared(seed, load):
    net, optimizer = network(seed)
    checkpoints = Checkpoints(Path("checkpoints"), accelerator, net, optimizer)
    found = checkpoints.load() if load else {}
    if zero.is_used(accelerator):
        accelerator.free_memory()
        accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = CLIP
        module, optimizer = accelerator.prepare(net, optimizer)
    else:
        module = accelerator.prepare_model(net)
    checkpoints.load_moments(module)
    return checkpoints, net, module, Update(accelerator, module, optimizer, clip=CLIP), found

def step(module, update, number, bad=""):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(12, 7, generator=generator).tensor_split(accelerator.num_processes)[accelerator.process_index]
    parts = x.tensor_split(2)
    for part, x in enumerate(parts):
        loss = (module(x).square().sum() / 36) * accelerator.num_processes
        if bad == f"loss {part}" and accelerator.process_index == 0:
            loss = loss * torch.nan
        if bad == "gradient" and accelerator.is_last_process:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        update.backward(loss, last=part == 1)
    figures, problem = update.take()
    return [float(figures["loss"]), float(figures["gradient_norm"]), PROBLEMS[int(problem)]]

CLIP = 0.5
mode = sys.argv[1]
def main():  # the model is freed before the process group is destroyed, as in the recipes
    global accelerator
    accelerator = start("fp32")
    checkpoints, net, module, update, found = prepared(0 if mode == "first" else 1, mode == "on")
    rows = []
    if mode == "first":
        rows = [step(module, update, number) for number in range(5)]
        checkpoints.save(5, {"batch": 5}, module)
        checkpoints.settle()
    for number in range(5, 9):
        rows.append(step(module, update, number))
    if mode == "first":
        before = {name: weight.clone() for name, weight in checkpoints.weights(module).items()}
        for bad in ("loss 0", "loss 1", "gradient"):
            rows.append(step(module, update, 9, bad))
        after = checkpoints.weights(module)
        assert all(torch.equal(before[name], after[name]) for name in after), "a skipped step changed the weights"
        rows.append(step(module, update, 10))
        if zero.is_used(accelerator):
            zero.set_weight(module, "0.weight", torch.full((9, 7), 0.5))
            assert (zero.whole_weight(module, "0.weight") == 0.5).all()
            x = torch.ones(2, 7)
            bias = checkpoints.weights(module)["0.bias"]
            seen = []
            net[1].register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
            module(x)
            assert torch.allclose(seen[0], 3.5 + bias.expand(2, 9)), "the network computes with another weight"
    if accelerator.is_main_process:
        state = {"found": found, "rows": rows, "kind": str(accelerator.distributed_type)}
        Path(f"{mode}.json").write_text(json.dumps(state))

with user_errors("script"):
    main()
"""


def launched(folder, mode, stage, processes):
    (folder / "script.py").write_text(SCRIPT)
    config = {"processes": processes, "config": f"zero{stage}" if stage else "cpu2" if processes > 1 else "cpu"}
    done = run(folder / "script.py", mode, folder=folder, **config)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{mode}.json").read_text())


pytestmark = pytest.mark.timeout(400)  # three starts a test


@pytest.fixture(scope="module")
def by_ddp(tmp_path_factory):
    folder = made_once(tmp_path_factory, "ddp", lambda folder: launched(folder, "first", 0, 2))
    return folder, json.loads((folder / "first.json").read_text())


def figures(rows):
    return [row[0] for row in rows if not row[2]], [row[1] for row in rows if not row[2]]


def same(one, two):
    for a, b in zip(figures(one), figures(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert [row[2] for row in one] == [row[2] for row in two]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_same_as_ddp(tmp_path, by_ddp, stage):
    """ZeRO has DDP's losses, norms and skipped steps, and each goes on from the other's checkpoint."""
    folder, ddp = by_ddp
    shared = launched(tmp_path, "first", stage, 2)
    assert "DEEPSPEED" in shared["kind"] and "DEEPSPEED" not in ddp["kind"]
    same(shared["rows"], ddp["rows"])
    assert [row[2] for row in ddp["rows"][-4:]] == ["the loss is not finite"] * 2 + ["the gradient is not finite", ""]
    # ZeRO's checkpoint under DDP, at another world size
    on = launched(tmp_path, "on", 0, 1)
    assert on["found"] == {"step": 5, "batch": 5}
    same(on["rows"], ddp["rows"][5:9])
    # DDP's under ZeRO, at another world size: 3
    (tmp_path / "checkpoints").rename(tmp_path / "theirs")
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    on = launched(tmp_path, "on", stage, 3)
    same(on["rows"], ddp["rows"][5:9])
