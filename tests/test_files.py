"""Files and folders that appear whole or not at all."""

import os
import socket
import subprocess
import sys

import pytest

from bigtrain.files import remove_unfinished, temporary_for, whole_file, whole_folder, write_text

HERE = socket.gethostname()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_failed_block(tmp_path):
    """A block that fails leaves the file that was there, and nothing beside it."""
    write_text(tmp_path / "a", "before")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "before" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("strength", ["renamed", "synced", "durable"])
def test_new_folder(tmp_path, strength):
    """A folder takes the place of an older one as a whole: nothing of that is left in it."""
    for name in ("first", "second"):
        with whole_folder(tmp_path / "x", strength) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / name).touch()
    assert names(tmp_path) == ["x"] and names(tmp_path / "x" / "inner") == ["second"]


def test_folder_that_cannot_be_renamed(tmp_path, monkeypatch):
    """Where a folder cannot take its name, the older one keeps it."""
    with whole_folder(tmp_path / "x") as folder:
        (folder / "first").touch()
    rename = type(tmp_path).rename

    def refuse(path, target):
        if target == tmp_path / "x" and ".old." not in path.name:
            raise OSError("input/output error")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(OSError, match="input/output"), whole_folder(tmp_path / "x") as folder:
        (folder / "second").touch()
    assert names(tmp_path) == ["x"] and names(tmp_path / "x") == ["first"]


def test_remove_unfinished(tmp_path):
    """What our own writers left behind goes, in a shared folder only that of those who have ended."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours = [f"a.{HERE}-{gone.pid}.tmp", temporary_for(tmp_path / "b").name, "c.elsewhere-1.tmp"]
    theirs = ["view.backup.tmp", "notes.tmp", "d.elsewhere-1.txt"]
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, is_shared=True)
    assert names(tmp_path) == sorted([*ours[1:], *theirs])
    os.utime(tmp_path / ours[2], (0, 0))
    remove_unfinished(tmp_path, is_shared=True)
    assert names(tmp_path) == sorted([ours[1], *theirs])
    remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted(theirs)


def test_long_name(tmp_path):
    """A name as long as the file system allows has room for its temporary name."""
    write_text(tmp_path / ("é" * 127), "text")
    assert names(tmp_path) == ["é" * 127]
