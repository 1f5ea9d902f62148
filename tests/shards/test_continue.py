"""A build that is run again: pictures were repaired, the dataset has changed, a disk failed, a shard is gone."""

import errno
import json
import os
from pathlib import Path

import pytest

from bigtrain.data.schema import Box, Object, Sample
from bigtrain.images import UnreadableError
from bigtrain.retry import RetryPolicy
from shards import disk as durable
from shards import pack
from shards.build import PARTS_FOLDER
from shards.pack import fingerprint, write_shard
from shards.treatment import Treatment


def spoil(*paths):
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.write_bytes(b"no picture")
    return whole


@pytest.mark.parametrize("max_skipped", [0.0, 0.5])
def test_repaired_pictures(animals, build_folder, contents, tmp_path, max_skipped):
    """Pictures that were repaired are read by the next run."""
    build_folder(animals, tmp_path / "whole")
    broken = spoil(animals / "dog" / "dog2.jpg", animals / "dog" / "dog3.jpg")
    if max_skipped:
        killed_behind(2, build_folder, animals, tmp_path / "out", max_skipped=max_skipped)
    else:
        with pytest.raises(ValueError, match=r"cannot be read.* repair them"):
            build_folder(animals, tmp_path / "out", max_skipped=max_skipped)
    for path, data in broken.items():
        path.write_bytes(data)
    build_folder(animals, tmp_path / "out", max_skipped=max_skipped)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def killed_behind(shards, build_folder, root, out, **options):
    """Interrupt a build after this many shards."""
    made = []

    def counting(task):
        if len(made) == shards:
            raise KeyboardInterrupt
        made.append(task)
        return write_shard(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.build.write_shard", counting)
        with pytest.raises(KeyboardInterrupt):
            build_folder(root, out, **options)
    assert len(list((out / PARTS_FOLDER).glob("*.json"))) == shards


def test_replaced_picture(animals, build_folder, contents, paint, tmp_path):
    """A picture that was replaced under the same name is packed anew."""
    killed_behind(2, build_folder, animals, tmp_path / "out")
    paint(99, path=animals / "cat" / "cat1.jpg")
    build_folder(animals, tmp_path / "out")
    build_folder(animals, tmp_path / "anew")
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_fingerprint(tmp_path):
    """A fingerprint depends on key, labels, source, mask and bytes, and is the same every time."""
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"one")
    one = Sample("a", picture, "jpg", [Object("cat")])
    others = [
        Sample("b", picture, "jpg", [Object("cat")]),
        Sample("a", picture, "jpg", [Object("dog")]),
        Sample("a", picture, "jpg", [Object("cat", box=None)], source="elsewhere"),
        Sample("a", picture, "jpg", [Object("cat")], mask=b"mask"),
        Sample("a", b"one", "jpg", [Object("cat")]),
        Sample("a", b"two", "jpg", [Object("cat")]),
    ]
    before = [fingerprint([sample]) for sample in (one, *others)]
    assert len(set(before)) == len(before)
    assert [fingerprint([sample]) for sample in (one, *others)] == before
    picture.write_bytes(b"three")
    assert fingerprint([one]) != before[0]


def failing(monkeypatch, number, times):
    """Make opening one picture file fail this many times."""
    opened, left = Path.open, [number] * times

    def sometimes(path, *args, **kwargs):
        if path.name == "dog2.jpg" and left:
            raise OSError(left.pop(), os.strerror(number))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", sometimes)
    monkeypatch.setattr(pack, "RETRY", RetryPolicy(attempts=4, first_wait_s=0.001))


def test_read_retry(animals, build_folder, contents, tmp_path, monkeypatch):
    """A disk that fails for a moment costs no sample."""
    build_folder(animals, tmp_path / "whole")
    failing(monkeypatch, errno.EIO, times=2)
    build_folder(animals, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_failing_disk(animals, build_folder, contents, tmp_path, monkeypatch):
    """A disk that keeps failing stops the build, and the next run continues it."""
    build_folder(animals, tmp_path / "whole")
    with monkeypatch.context() as patch:
        failing(patch, errno.EIO, times=99)
        with pytest.raises(OSError, match=r"dog2.jpg cannot be read \(tried 4 times.*the build continues"):
            build_folder(animals, tmp_path / "out")
    build_folder(animals, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_missing_picture(tmp_path):
    """A missing picture counts as unreadable, so that it is skipped, and not as a disk failure."""
    with pytest.raises(UnreadableError, match="No such file"):
        pack.read_bytes(tmp_path / "missing.jpg")


def test_missing_shard(animals, build_folder, contents, tmp_path, capsys):
    """A finished set that lacks one of its shards is built again, to the same bytes."""
    build_folder(animals, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "000001.tar").unlink()
    build_folder(animals, tmp_path / "out")
    assert "'000001.tar' are missing or were changed" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_fsync_order(animals, build_folder, tmp_path, monkeypatch):
    """A shard is synced before it is renamed and its folder afterwards; the manifest comes last."""
    done = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor):
        done.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".")[0]))
        fsync(descriptor)

    def noted_replace(path, target):
        done.append(("rename", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(durable.os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    build_folder(animals, tmp_path / "out")
    for name in ("000000.tar", "manifest.json"):
        place = done.index(("rename", name))
        assert done[place - 1] == ("sync", name.split(".")[0])
        assert done[place + 1] == ("sync", "out")
    assert done[-2][1] == "manifest.json"


def test_clip_boxes(paint, tmp_path):
    """Boxes are cut to their pictures, and those left without an area are dropped."""
    boxes = [Box(-3, 2, 5, 90), Box(1, 1, 4, 4), Box(20, 30, 40, 50), Box(4, 4, 4, 9)]
    sample = Sample("a", paint(), "jpg", [Object("cat", box) for box in boxes])
    _, ((_, record),), _ = pack.prepare(sample, Treatment())
    assert json.loads(record) == {
        "classes": ["cat"],
        "boxes": [[0, 2, 5, 20, "cat"], [1, 1, 4, 4, "cat"]],
        "source": "",
    }
