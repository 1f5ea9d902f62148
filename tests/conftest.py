"""For all tests: where fixtures are, how long a test may take, and that no property test fails for being slow."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: test workers share the cores

import pytest
from hypothesis import settings

pytest_plugins = ["tests.fixtures", "tests.hand_made", "tests.servers", "tests.small_networks"]

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
LIMIT_S = {"slow": 3600, "slurm": 900, "gpu": 600}  # by marker; of the others: pyproject.toml
TRAINING_LIMIT_S = 400  # in tests/recipes, which start processes that train: for a busy machine


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="write tests/golden/ anew from this code")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    # a cluster serves one test at a time: first, so that one worker has them all and the other steals what follows
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    for item in items:
        limits = [limit for marker, limit in LIMIT_S.items() if item.get_closest_marker(marker)]
        limits += [TRAINING_LIMIT_S] if "recipes" in item.path.parts else []
        if limits and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(max(limits)))
