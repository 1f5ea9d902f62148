"""The first losses and the final scores of each recipe, on a CPU, are those that it had: tests/golden/RECIPE.json.

They guard changes that should change nothing. Where a change is meant to change them, write them anew and say so:
pytest tests/recipes/test_golden.py --write-golden
"""

import json
import platform

import pytest
import torch

from tests.launching import ROOT
from tests.runs import losses, scores

RECIPES = ("defend", "deep_novelty", "pretrain", "signatures", "baselines")
STAGES = {"defend": ("tune", "distil"), "deep_novelty": ("train",), "pretrain": ("pretrain",)}


ILL_CONDITIONED = ("Mahalanobis", "Gaussian mixture")  # the inverse of a covariance multiplies the features' last bits


def found(run, recipe):
    """The losses of each stage, and the scores by detector and split, in the order of their keys."""
    record = {stage: losses(run, stage) for stage in STAGES.get(recipe, ())}
    if (run / "scores.parquet").exists():
        table = scores(run).sort_values("key", kind="stable")
        names = table["detector"] if "detector" in table else [recipe] * len(table)
        for name, split, score in zip(names, table["split"], table["score"], strict=True):
            record.setdefault(f"{name}, {split}", []).append(score)
    return record


def instruction_set():
    """What a CPU's last bits depend on."""
    return {
        "machine": platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "torch": torch.__version__,
    }


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_golden(run_of_twenty_steps, recipe, processes, request):
    """Bit for bit on such a CPU as wrote them, within 1e-6 on others (1e-4 where a covariance is inverted)."""
    file = ROOT / "tests" / "golden" / f"{recipe}.json"
    now = found(run_of_twenty_steps(recipe, processes), recipe)
    if request.config.getoption("--write-golden"):
        record = json.loads(file.read_text()) if file.exists() else {}
        record |= {"on": instruction_set(), str(processes): now}
        rows = [f"{json.dumps(name)}: {json.dumps(record[name], sort_keys=True)}" for name in sorted(record)]
        file.write_text("{" + ",\n".join(rows) + "}\n")
    record = json.loads(file.read_text())
    golden = record[str(processes)]
    assert now.keys() == golden.keys()
    for name, values in golden.items():
        if instruction_set() == record["on"]:
            assert now[name] == values, name
        within = 1e-4 if name.startswith(ILL_CONDITIONED) else 1e-6
        assert now[name] == pytest.approx(values, rel=within, abs=within), name


@pytest.mark.parametrize("recipe", STAGES)
def test_twenty_losses(recipe):
    """The golden losses are twenty a stage: a run that ended early would have fewer."""
    record = json.loads((ROOT / "tests" / "golden" / f"{recipe}.json").read_text())
    assert {len(record[processes][stage]) for processes in "12" for stage in STAGES[recipe]} == {20}
