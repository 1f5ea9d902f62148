"""For the recipes, many of which run in the test's own process."""

import pytest


@pytest.fixture(autouse=True)
def recipe_in_this_process(clean_process):
    """Every test of this folder begins and ends with a process that no recipe has changed."""
