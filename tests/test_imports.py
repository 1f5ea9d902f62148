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
GROUND = ["choices", "files", "images", "jpeg", "pages", "progress", "retry", "text"]
FLOORS = {  # of bigtrain, from the ground up: each imports itself and what is named
    **dict.fromkeys(GROUND, ()),
    "data": (),
    "models": ("data",),
    "objectives": ("data", "models"),
    "detectors": ("data", "models", "objectives"),
    "evaluation": ("data", "models", "objectives", "detectors"),
    "methods": ("data", "models", "objectives", "detectors", "evaluation"),
    "runtime": ("data",),
    "serving": ("data", "models", "objectives", "detectors", "evaluation", "methods", "runtime"),
    "training": ("data", "models", "objectives", "detectors", "evaluation", "methods", "runtime"),
}
SCHEMA = ("bigtrain.data.schema", "bigtrain.data.set_files")
# of a run, slurm knows what any process above it knows: exit codes, where ranks meet, what the log says
AROUND_A_RUN = ("bigtrain.runtime.exit_codes", "bigtrain.runtime.ports", "bigtrain.runtime.follow_log")
MAY_IMPORT = {
    **{f"bigtrain.{floor}": [f"bigtrain.{below}" for below in floors] for floor, floors in FLOORS.items()},
    "bigtrain": [f"bigtrain.{floor}" for floor in FLOORS],  # __init__ and the command are the face of it all
    "recipes": [f"bigtrain.{floor}" for floor in FLOORS],
    "shards": [*SCHEMA],
    "slurm": [*SCHEMA, "bigtrain.data.protocol", *AROUND_A_RUN],
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
    here = file.relative_to(TOP).with_suffix("").parts
    room = ".".join(here[:2]) if here[0] == "bigtrain" and here[1] in FLOORS else here[0]
    allowed = [room, *MAY_IMPORT[room], *(f"bigtrain.{name}" for name in GROUND)]
    for name in imported(file):
        is_allowed = any(f"{name}.".startswith(f"{a}.") or f"{a}.".startswith(f"{name}.") for a in allowed)
        assert is_allowed or name.split(".")[0] not in OURS, f"{file} imports {name}"


def test_rooms_are_apart():
    """No method imports another: what two share is a floor lower. No recipe imports another either."""
    for file in FILES.values():
        here = file.relative_to(TOP).with_suffix("").parts
        if here[:2] == ("bigtrain", "methods") and len(here) > 3:
            others = [name for name in imported(file) if name.startswith("bigtrain.methods.")]
            assert all(name.split(".")[2] == here[2] for name in others), file
        if here[0] == "recipes" and len(here) == 2:
            others = [name for name in imported(file) if name.startswith("recipes.")]
            assert all(name.startswith("recipes.presets") for name in others), file


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
RECIPES = ("defend", "deep_novelty", "panda", "pretrain", "tune", "distil", "signatures", "baselines")
COMMANDS = {  # command -> what it may import
    "bigtrain/cli.py --help": set(),
    **{f"bigtrain/cli.py {name} --help": set() for name in ("score", "calibrate", "export", "push", "serve", "report")},
    "bigtrain/cli.py watch --once nowhere": {"rich"},
    "bigtrain/cli.py serve --detector nowhere": {"numpy", "PIL"},
    "bigtrain/cli.py score --detector nowhere --images nowhere --out s.csv": {"numpy", "PIL"},
    "bigtrain/cli.py score --detector nowhere --images nowhere --out s.txt": {"numpy", "PIL"},
    "shards/__main__.py --help": {"numpy", "PIL"},
    "slurm/slurm_cli.py --help": {"numpy", "pyarrow", "fsspec", "rich"},
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
    code = "import sys, bigtrain.methods.defend.detector, bigtrain.detectors.network_detector; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, env=ENVIRONMENT, capture_output=True, text=True)
    assert "timm" in done.stdout.split() and not {"sklearn", "scipy", "pandas", "wandb"} & set(done.stdout.split())
