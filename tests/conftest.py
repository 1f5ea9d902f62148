"""For all tests: no test fails for being slow; servers on loopback."""

import pytest
from hypothesis import settings

from tests.servers import faulty, nginx, s3, s3_server  # noqa: F401 (fixtures)

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(config, items):
    """In several processes a file's tests stay together, for their fixtures, and those that share SLURM's nodes."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "slurm" if item.get_closest_marker("slurm") else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))
