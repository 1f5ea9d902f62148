"""Imports point one way (design.md): read from the source, so that those inside functions count too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
OURS = ("bigtrain", "recipes", "shards", "slurm")
FILES = {str(f.relative_to(TOP)): f for top in OURS for f in sorted((TOP / top).rglob("*.py"))}
ALL = ["bigtrain.data", "bigtrain.models", "bigtrain.objectives", "bigtrain.detectors", "bigtrain.runtime"]
ALL += ["bigtrain.evaluation"]
MAY_IMPORT = {  # beside itself
    "recipes": ALL,
    "shards": ["bigtrain.data.schema"],
    # of a run it knows what any process above it knows: exit codes, and what the log says
    "slurm": [
        "bigtrain.data.schema",
        "bigtrain.data.protocol",
        "bigtrain.runtime.exit_codes",
        "bigtrain.runtime.watch",
    ],
    "bigtrain.detectors": ["bigtrain.data", "bigtrain.models", "bigtrain.objectives"],
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
    allowed = ALL if itself.endswith(".py") else [itself, *MAY_IMPORT.get(itself, [])]  # bigtrain/cli.py is the face
    for name in imported(file):
        is_allowed = any(f"{name}.".startswith(f"{a}.") or f"{a}.".startswith(f"{name}.") for a in allowed)
        assert is_allowed or name.split(".")[0] not in OURS, f"{file} imports {name}"


def test_one_module_alone_imports_xformers():
    uses = {name for name, file in FILES.items() if any(m.split(".")[0] == "xformers" for m in imported(file))}
    assert uses == {"bigtrain/models/attention.py"}


def test_no_module_is_named_after_one_of_the_standard_library():
    assert not {part.removesuffix(".py") for name in FILES for part in name.split("/")} & sys.stdlib_module_names


def test_import_bigtrain_is_cheap():
    code = "import sys, bigtrain, bigtrain.data.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TOP).returncode == 0
