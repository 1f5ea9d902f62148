"""Imports point one way (design.md): read from the source, so that those inside functions count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ENVIRONMENT

TOP = Path(__file__).parents[1]
OURS = ("bigtrain", "recipes", "shards", "slurm")
FILES = {str(f.relative_to(TOP)): f for top in OURS for f in sorted((TOP / top).rglob("*.py"))}
GROUND = ["bigtrain.choices", "bigtrain.text"]
ALL = [*GROUND, "bigtrain.data", "bigtrain.models", "bigtrain.objectives", "bigtrain.detectors", "bigtrain.runtime"]
ALL += ["bigtrain.evaluation"]
MAY_IMPORT = {  # beside itself
    "recipes": ALL,
    "shards": ["bigtrain.data.schema", "bigtrain.data.set_files"],
    # of a run it knows what any process above it knows: exit codes, where ranks meet, and what the log says
    "slurm": [
        "bigtrain.data.schema",
        "bigtrain.data.protocol",
        "bigtrain.data.set_files",
        "bigtrain.runtime.exit_codes",
        "bigtrain.runtime.ports",
        "bigtrain.runtime.watch",
    ],
    "bigtrain.detectors": ["bigtrain.data", "bigtrain.models", "bigtrain.objectives"],
    "bigtrain.runtime": ["bigtrain.data"],
    "bigtrain.evaluation": ["bigtrain.data", "bigtrain.objectives", "bigtrain.detectors"],
}


def imported(file):
    """The modules a file imports, by full name; of `from a import b` both a and a.b."""
    package = list(file.relative_to(TOP).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(parts + ([node.module] if node.module else []))
            yield from [base, *(f"{base}.{alias.name}" for alias in node.names)]


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_imports_point_one_way(file):
    here = file.relative_to(TOP).parts
    itself = here[0] if here[0] != "bigtrain" else ".".join(here[:2])
    allowed = ALL if itself.endswith(".py") else [itself, *GROUND, *MAY_IMPORT.get(itself, [])]  # cli.py is the face
    for name in imported(file):
        is_allowed = any(f"{name}.".startswith(f"{a}.") or f"{a}.".startswith(f"{name}.") for a in allowed)
        assert is_allowed or name.split(".")[0] not in OURS, f"{file} imports {name}"


def test_xformers_in_one_module():
    """One module alone imports xFormers."""
    uses = {name for name, file in FILES.items() if any(m.split(".")[0] == "xformers" for m in imported(file))}
    assert uses == {"bigtrain/models/attention.py"}


def test_no_imports_of_tests():
    """No test imports a test or conftest: tests share modules of their own, and fixtures need no import."""
    for file in sorted((TOP / "tests").rglob("*.py")):
        shared = [name for name in imported(file) if name.startswith("tests.")]
        assert not [name for name in shared if ".test_" in name or "conftest" in name], file


def test_names():
    """Names of tests can be typed and selected; where one does not say what is required, its docstring does."""
    for file in sorted((TOP / "tests").rglob("test_*.py")):
        functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        assert not [f.name for f in functions if f.name.startswith("test_") and len(f.name) > 35], file


def test_no_stdlib_names():
    """No module is named after one of the standard library."""
    assert not {part.removesuffix(".py") for name in FILES for part in name.split("/")} & sys.stdlib_module_names


def test_import_bigtrain_is_cheap():
    code = "import sys, bigtrain, bigtrain.data.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TOP).returncode == 0


HEAVY = {"torch", "torch._dynamo", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "xformers"}
HEAVY |= {"sklearn", "scipy", "pandas", "tensorboard", "wandb", "numpy", "pyarrow", "fsspec", "PIL", "jinja2"}
HEAVY |= {"rich", "tyro"}
SETTINGS = {"numpy", "pyarrow", "fsspec", "tyro", "rich"}
NETWORK = {*SETTINGS, "torch", "torchvision", "timm", "webdataset", "PIL"}
RECIPES = ("defend", "deep_novelty", "pretrain", "signatures", "baselines")
COMMANDS = {  # command -> what it may import
    "bigtrain/cli.py --help": set(),
    "bigtrain/cli.py watch --once nowhere": {"rich"},
    "shards/__main__.py --help": {"numpy", "PIL"},
    "slurm/cli.py --help": {"numpy", "pyarrow", "fsspec", "rich"},
    **{f"recipes/{name}.py --help": SETTINGS for name in RECIPES},
    **{f"recipes/{name}.py --print-config": SETTINGS for name in RECIPES},
    "recipes/defend.py --nonsense": SETTINGS,
    "recipes/defend.py --seed -1": SETTINGS,
    "recipes/defend.py --train nowhere --test nowhere --known a --out new": SETTINGS,
    "recipes/defend.py --train SHARDS --test SHARDS --known cat --out new": SETTINGS,
    "recipes/defend.py --train SHARDS --test SHARDS --known bag --out new --teacher vit_enormous": SETTINGS,
    "recipes/defend.py --train SHARDS --test SHARDS --known bag --out new --teacher none.safetensors": SETTINGS,
    "recipes/baselines.py --train SHARDS --known bag --out new --detectors forest": SETTINGS,
    "recipes/baselines.py --train SHARDS --known bag --out new --network resnet5000": SETTINGS,
    "recipes/deep_novelty.py --train SHARDS --known bag coat --reference SHARDS --out new --accumulate 3": SETTINGS,
    "recipes/baselines.py --train SHARDS --known bag --out new --finetuned none.safetensors": SETTINGS,
    "recipes/deep_novelty.py --train SHARDS --known bag coat --out new --reference nowhere": SETTINGS,
    "recipes/pretrain.py --train SHARDS --out new --model resnet5000": SETTINGS,
    "recipes/defend.py --train SHARDS --test SHARDS --known bag --out RUN": SETTINGS,  # a run of other settings
    "recipes/defend.py --train SHARDS --test SHARDS --known bag --out new --teacher TEACHER --tuned-blocks 99": NETWORK,
    "recipes/signatures.py --train SHARDS --known bag --out new --network resnet18 --no-pretrained --layer x": NETWORK,
    "recipes/baselines.py --train SHARDS --known bag --out new --network resnet18 --no-pretrained --layer x": {
        *NETWORK,
        "scipy",  # of a detector, its special functions
    },
    "recipes/pretrain.py --train SHARDS --out new --model alexnet --image-size 32": NETWORK,
    "recipes/deep_novelty.py --train SHARDS --known bag coat --out new --branches one --membership-weight 0 "
    "--network alexnet --no-pretrained --image-size 32 --resize 36": NETWORK,
}
TELLS = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
print("\\nimported", *sys.modules)
"""


@pytest.fixture(scope="module")
def places(shards, teacher, tmp_path_factory):
    """What stands for the words in capitals."""
    run = tmp_path_factory.mktemp("imports") / "run"
    run.mkdir()
    (run / "config.json").write_text('{"settings": {}}')
    return {"SHARDS": shards / "train", "TEACHER": teacher, "RUN": run}


@pytest.mark.parametrize("command", COMMANDS)
def test_imports_of(command, places, tmp_path):
    """Help, settings and mistakes are answered without torch, mistakes of a network without what trains and judges."""
    words = [str(places.get(word, word)) for word in command.split()]
    line = [sys.executable, "-c", TELLS, str(TOP / words[0]), *words[1:]]
    done = subprocess.run(
        line, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(TOP)}, capture_output=True, text=True
    )
    imported_modules = set(done.stdout.splitlines()[-1].split())
    assert "imported" in imported_modules, done.stderr
    assert not (HEAVY & imported_modules) - COMMANDS[command], done.stdout + done.stderr
    if not command.endswith(("--help", "--print-config")):
        assert "error" in done.stderr or "Unrecognized" in done.stderr, done.stderr
        assert not (tmp_path / "new").exists()


def test_stream_worker_imports():
    """A stream worker needs torch for its tensors, and nothing that trains, judges or builds networks."""
    code = "import sys, bigtrain.data.stream; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, env=ENVIRONMENT, capture_output=True, text=True)
    names = {"torchvision", "timm", "accelerate", "sklearn", "scipy", "pandas", "torch._dynamo", "recipes.defend"}
    assert "torch" in done.stdout.split() and not names & set(done.stdout.split())


def test_load_detector_imports():
    """Loading a detector imports none but its own: scikit-learn and SciPy are for the classical ones."""
    code = "import sys, bigtrain.detectors.distillation, bigtrain.detectors.network; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, env=ENVIRONMENT, capture_output=True, text=True)
    assert "timm" in done.stdout.split() and not {"sklearn", "scipy", "pandas", "wandb"} & set(done.stdout.split())
