"""recipes/WALKTHROUGH.md: every command of it, on the pictures it speaks of."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.launching import ENVIRONMENT, ROOT

DATA = Path(os.environ.get("BIGTRAIN_TEST_DATA", "nowhere"))
SETS = ("magnetic-tile-sample.tar.gz", "cifar10-pictures.tar.gz")
NETWORK = DATA / "vit-s14-focus-9-blocks.safetensors"
TEXT = (ROOT / "recipes" / "WALKTHROUGH.md").read_text()


def test_pictures():
    """Each picture of the text is there."""
    named = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXT)
    assert named and all(Image.open(ROOT / "recipes" / name).width > 400 for name in named)


@pytest.mark.skipif(not all((DATA / name).is_file() for name in SETS), reason="without BIGTRAIN_TEST_DATA")
@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@pytest.mark.timeout(900)
def test_every_command(tmp_path):
    """All of them in one shell, which stops at the first that fails; the tables, pages and pictures are there."""
    for name in SETS:
        with tarfile.open(DATA / name) as tar:
            tar.extractall(tmp_path / "data", filter="data")
    script = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL))
    if not shutil.which("chromium"):
        script = re.sub(r"^chromium .*$", "", script, flags=re.MULTILINE)
    environment = {**ENVIRONMENT, "DATA": str(tmp_path / "data"), "NETWORK": str(NETWORK), "PYTHONPATH": str(ROOT)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert float(re.search(r"largest relative difference (\S+)", done.stdout)[1]) < 1e-4
    assert done.stdout.count("known pictures were flagged") == 4 and '"novel":true' in done.stdout
    (place,) = (folder for folder in tmp_path.glob("tmp.*") if (folder / "tiles.csv").is_file())
    for name in ("novel.html", "compared.html", "vehicles.html", "tiles.onnx", "vehicles.onnx", "int8.parquet"):
        assert (place / name).stat().st_size > 10_000, name
    assert len(list((place / "novel").iterdir())) > 50
    if shutil.which("chromium"):
        assert Image.open(place / "compared.png").size == Image.open(ROOT / "recipes/walkthrough/compared.png").size
