"""Rules of the house that a reader relies on: sizes, names, words, docstrings. Imports: test_imports.py."""

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
FILES = {
    str(f.relative_to(TOP)): f for top in ("bigtrain", "recipes", "shards", "slurm") for f in (TOP / top).rglob("*.py")
}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
MAX_FILE, MAX_FUNCTION = 300, 60  # lines
LONGER = {  # a paper's training stage reads from top to bottom: data, network, optimizer, the loop, what it leaves
    ("recipes/deep_novelty.py", "train"),
    ("recipes/pretrain.py", "pretrain"),
    ("bigtrain/training/dense_tuning.py", "dense_tuning"),
    ("bigtrain/evaluation/judge.py", "judge"),  # a page of contract above a page of steps
}
ROOM = {
    "equations.py",
    "network.py",
    "detector.py",
    "page.py",
    "checks.py",
}  # a room of bigtrain/methods has files of these names
AXES = re.compile(r"_(?=[A-Z0-9]*[A-Z])[BVNnMTLDdHKCWhwRSPQEGFJAX0-9]+$")


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_files_fit():
    """No file is over 300 lines."""
    lines = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE}


def test_functions_fit():
    """No function is over 60 lines, but for those that are named here, which are."""
    long = {
        (name, node.name): node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in functions(tree)
        if node.end_lineno - node.lineno >= MAX_FUNCTION
    }
    assert long.keys() == LONGER, long


def test_names_of_files():
    """No two files share a name, except in the methods' folders, which share one layout."""
    names = Counter(
        file.name for name, file in FILES.items() if not (name.startswith("bigtrain/methods/") and file.name in ROOM)
    )
    allowed = {"__init__.py", "network.py"}  # models/network.py is what every room's network is made of
    assert not [name for name, count in names.items() if count > 1 and name not in allowed]
    assert not {"utils.py", "helpers.py", "common.py", "misc.py"} & names.keys()


def banned_words():
    rows = [
        line.split("|") for line in (TOP / "bigtrain" / "WORDS.md").read_text().splitlines() if line.count("|") == 4
    ]
    return {
        word.strip() for *_, never, _ in rows for word in never.split(",") if word.strip() not in ("", "never", "---")
    }


def parts_of(name):
    """ "MaxLives" and "max_lives" -> {"max", "lives"}, and the whole name."""
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)} | {name.lower()}


def test_words():
    """No name in the code has a word in it that WORDS.md replaces by another."""
    banned = banned_words()
    assert {"patience", "lives", "anomaly"} <= banned
    found = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            own = getattr(node, "name", None) or getattr(node, "id", None) or getattr(node, "arg", None)
            if isinstance(own, str) and (wrong := parts_of(own) & banned):
                found.add((name, own, *wrong))
    assert not found


@pytest.mark.parametrize("folder", ["bigtrain", "recipes", "shards", "slurm"])
def test_modules_say_what_they_are(folder):
    """Every module begins with a docstring; each folder of the library says what is in it."""
    without = [
        n for n, tree in TREES.items() if n.startswith(f"{folder}/") and tree.body and not ast.get_docstring(tree)
    ]
    assert not without


def test_docstrings_give_shapes():
    """A public function of the library that takes a tensor says its axes, in the argument's name or the docstring."""
    missing = []
    for name, tree in TREES.items():
        if not name.startswith(("bigtrain/objectives/", "bigtrain/methods/", "bigtrain/models/")):
            continue
        for node in functions(tree):
            tensors = [a.arg for a in node.args.args if a.annotation and ast.unparse(a.annotation) == "Tensor"]
            if node.name.startswith("_") or not tensors or node.name == "forward":
                continue
            docstring = ast.get_docstring(node) or ""
            has_shape = re.search(r"\([A-Z.0-9][^)]*\)", docstring)
            if not docstring or not (has_shape or all(AXES.search(tensor) or tensor == "loss" for tensor in tensors)):
                missing.append((name, node.name, tensors))
    assert not missing


def test_nothing_generated_is_tracked():
    """No lock file's registry, no caches, no weights but the embedded sample's."""
    tracked = subprocess.run(["git", "ls-files"], cwd=TOP, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    weights = [name for name in tracked.stdout.split() if name.endswith((".safetensors", ".pth", ".npz", ".tar"))]
    assert all(name.startswith("recipes/presets/fashion/") for name in weights)
