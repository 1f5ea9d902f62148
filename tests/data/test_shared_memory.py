"""A container's small /dev/shm: a batch that does not fit ends the run with a sentence."""

import os
import subprocess
import sys

import pytest

from tests.launching import ROOT

READING = """
import sys
import numpy as np
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.data.views import Resized
if __name__ == "__main__":
    pictures = ShardSet(sys.argv[1])
    stream = Stream(pictures, pictures.plan(np.arange(64), 8, 0), Resized(512), workers=2)
    for batch in stream.batches(epochs=None):
        pass
"""


def test_little_shared_memory(shards, tmp_path):
    """The lost batch is told of, instead of being waited for for ever."""
    (tmp_path / "read.py").write_text(READING)
    command = f"{sys.executable} {tmp_path / 'read.py'} {shards / 'train'}"
    line = f"mount -t tmpfs -o size=3m tmpfs /dev/shm && exec {command}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", line],
            capture_output=True, text=True, check=False, timeout=250, cwd=ROOT, env=environment,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no mount namespace can be made here")
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no mount namespace can be made here")
    assert done.returncode == 1 and "cannot hand over its batch" in done.stderr
    assert "too little shared memory? Make /dev/shm larger" in done.stderr
