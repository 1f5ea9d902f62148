"""What a user reads of an error: our own sentences as they are, those of libraries with their names."""

import errno
import json

import numpy as np
import pyarrow as pa
import pytest

from bigtrain.runtime.trackers import check_installed, wandb_has_login
from bigtrain.text import told
from shards.keys import inside


def raised(action):
    try:
        action()
    except Exception as error:
        return told(error)
    raise AssertionError("nothing was raised")


def test_own_sentences(tmp_path):
    """Ours stand alone, and so do the system's."""
    assert raised(lambda: inside(tmp_path, "../x")).startswith("'../x' lies outside of")
    assert raised(lambda: (tmp_path / "x").read_text()).endswith(f"No such file or directory: '{tmp_path / 'x'}'")
    assert "no space is left on the disk of --out" in told(OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (lambda: np.linalg.cholesky(-np.eye(2)), "numpy says: LinAlgError: Matrix is not positive definite"),
        (lambda: pa.array([1, "a"], pa.int64()), "pyarrow says: ArrowInvalid"),
        (lambda: json.loads("{"), "json says: JSONDecodeError"),
    ],
    ids=["numpy", "pyarrow", "json"],
)
def test_sentences_of_libraries(action, says):
    """Errors of libraries are ValueErrors too, and do not pass for sentences of ours."""
    assert raised(action).startswith(says)


def test_wandb_without_login(monkeypatch, tmp_path):
    """wandb without a key is refused at once; a key, a netrc or the offline mode will do."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match="wandb has no login here"):
        check_installed(["wandb"])
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + 40 * "a" + "\n")
    assert wandb_has_login()
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_installed(["wandb"])
