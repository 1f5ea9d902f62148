"""Building, indexing and checking behind URLs: object stores and web servers on loopback."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from bigtrain.data.schema import Manifest
from bigtrain.data.set_files import read_index, read_manifest
from bigtrain.retry import RetryPolicy
from shards.check import check
from shards.index_tars import index_tars
from tests.servers import Fault, use_s3

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch):
    """Quick retries, and only our own: s3fs makes one attempt."""
    monkeypatch.setattr("shards.location.RETRY", RetryPolicy(attempts=5, first_wait_s=0.01))
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


@pytest.fixture
def far(contents):
    """Every file below a URL by its name."""

    def read(url: str) -> dict[str, bytes]:
        fs, path = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()
        return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in fs.find(path)}

    return read


@pytest.mark.parametrize("workers", [1, 2])
def test_s3_same_bytes(animals, build_folder, contents, far, s3, tmp_path, workers):
    """A build on S3 is the same bytes as a local one, and once finished is not written again."""
    build_folder(animals, tmp_path / "local")
    manifest = build_folder(animals, f"{s3.url}/set", workers=workers)
    assert far(f"{s3.url}/set") == contents(tmp_path / "local")
    assert read_manifest(f"{s3.url}/set") == manifest
    assert check(f"{s3.url}/set") == []
    assert build_folder(animals, f"{s3.url}/set") == manifest  # finished: nothing is written again


def test_large_shards_go_up_in_parts(paint, build_folder, contents, far, s3, tmp_path, monkeypatch):
    monkeypatch.setattr("shards.location.PIECE_BYTES", 1 << 16)
    for number in range(6):
        paint(number, size=(200, 100), path=tmp_path / "pictures" / "a" / f"{number}.jpg")
    build_folder(tmp_path / "pictures", tmp_path / "local")
    build_folder(tmp_path / "pictures", f"{s3.url}/set")
    assert far(f"{s3.url}/set") == contents(tmp_path / "local")
    assert check(f"{s3.url}/set") == []


def test_memory_and_file_urls(animals, build_folder, contents, far, tmp_path):
    """Builds at `memory://` and `file://` addresses are the same bytes as a local one."""
    build_folder(animals, tmp_path / "local")
    build_folder(animals, f"file://{tmp_path}/address")
    assert contents(tmp_path / "address") == contents(tmp_path / "local")
    build_folder(animals, "memory://built/set", workers=2)
    try:
        assert far("memory://built/set") == contents(tmp_path / "local")
        assert check("memory://built/set") == []
    finally:
        fsspec.filesystem("memory").rm("/built", recursive=True)


def test_s3_resume_after_kill(paint, build_folder, contents, far, s3, tmp_path):
    """A killed build on S3 continues to the same bytes."""
    root, out = tmp_path / "pictures", f"{s3.url}/set"
    for number in range(80):
        paint(number, size=(60, 60), path=root / f"class{number % 4}" / f"{number}.jpg")
    build_folder(root, tmp_path / "whole", samples_per_shard=4)
    options = ["--root", str(root), "--out", out, "--samples-per-shard", "4", "--workers", "2"]
    command = [sys.executable, "-m", "shards", "build", "folder", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    fs = fsspec.filesystem("s3")
    while not fs.exists(f"{out}/.parts/000003.json"):
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.01)
        fs.invalidate_cache()
    process.kill()
    process.wait()
    time.sleep(1)  # its workers end too
    fs.invalidate_cache()
    assert not fs.exists(f"{out}/manifest.json")
    build_folder(root, out, samples_per_shard=4)
    assert far(out) == contents(tmp_path / "whole")


@pytest.fixture
def refusing(s3, faulty, monkeypatch):
    """refusing[0] = n: the next n PUT requests get a real HTTP 503."""
    proxy = faulty(s3.endpoint)
    handler = proxy._server.RequestHandlerClass
    left = [0]
    passed_on = handler.do_PUT

    def put(self):
        if left[0]:
            left[0] -= 1
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            passed_on(self)

    monkeypatch.setattr(handler, "do_PUT", put)
    options = {**s3.options, "endpoint_url": proxy.url, "config_kwargs": {"retries": {"max_attempts": 0}}}
    use_s3(options, monkeypatch)
    return left


def test_upload_retry(animals, build_folder, contents, far, s3, refusing, quick, tmp_path, capsys):
    """An upload that fails is tried again."""
    build_folder(animals, tmp_path / "local")
    refusing[0] = 3
    build_folder(animals, f"{s3.url}/set")
    assert refusing[0] == 0
    assert "attempt 4 of 5" in capsys.readouterr().err
    assert far(f"{s3.url}/set") == contents(tmp_path / "local")


def test_upload_gives_up(animals, build_folder, contents, far, s3, refusing, quick, tmp_path):
    """Uploads that keep failing stop the build with a clear error, and it can continue later."""
    build_folder(animals, tmp_path / "local")
    refusing[0] = 1000
    with pytest.raises(OSError, match=r"cannot be written: tried 5 times; last error: .*Run the same command again"):
        build_folder(animals, f"{s3.url}/set")
    refusing[0] = 0
    assert "manifest.json" not in far(f"{s3.url}/set")
    build_folder(animals, f"{s3.url}/set")
    assert far(f"{s3.url}/set") == contents(tmp_path / "local")


def test_a_missing_bucket_stops_at_once(animals, build_folder, s3, quick):
    with pytest.raises(OSError, match=r"nowhere.* cannot be written .*check the address"):
        build_folder(animals, "s3://nowhere-at-all/set")


@pytest.fixture
def others(animals, build_folder, tmp_path) -> tuple[Path, Manifest]:
    """Tars without manifest and index, and the manifest that they had."""
    manifest = build_folder(animals, tmp_path / "others")
    for path in (tmp_path / "others").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    return tmp_path / "others", manifest


def test_index_over_http(others, nginx, tmp_path):
    """Tars on a web server get an index here, as a view; a missing tar leaves nothing."""
    folder, manifest = others
    (nginx.folder / tmp_path.name).symlink_to(folder)
    url = f"{nginx.url}/{tmp_path.name}"
    found = index_tars(url, out=tmp_path / "view", shards="{000000..000004}.tar", workers=2)
    assert (found.shards, found.shards_at) == (manifest.shards, url)
    assert sorted(path.name for path in (tmp_path / "view").iterdir()) == ["index.parquet", "manifest.json"]
    assert check(str(tmp_path / "view")) == []
    assert check(str(tmp_path / "view"), quick=True) == []
    (tmp_path / "names.txt").write_text("000002.tar\n000000.tar\n")
    found = index_tars(url, out=tmp_path / "two", shards=str(tmp_path / "names.txt"))
    assert [shard.file for shard in found.shards] == ["000002.tar", "000000.tar"]
    with pytest.raises(OSError, match=r"000005\.tar is missing"):
        index_tars(url, out=tmp_path / "three", shards="{000000..000005}.tar")
    assert not (tmp_path / "three").exists()


def test_index_on_s3(others, s3, tmp_path):
    """Tars on S3 get their index beside them, or here as a view."""
    folder, manifest = others
    fsspec.filesystem("s3").put(f"{folder}/", f"{s3.url}/set/", recursive=True)
    assert index_tars(f"{s3.url}/set", out=tmp_path / "view").shards_at == f"{s3.url}/set"
    assert check(str(tmp_path / "view")) == []
    assert index_tars(f"{s3.url}/set").shards == manifest.shards
    assert check(f"{s3.url}/set") == []
    assert read_index(f"{s3.url}/set").equals(read_index(str(tmp_path / "view")))


def test_http_retry(others, nginx, faulty, quick, tmp_path, capsys):
    """Requests to an unreliable web server are retried."""
    folder, manifest = others
    (nginx.folder / tmp_path.name).symlink_to(folder)
    proxy = faulty(nginx.url)
    proxy.faults = [Fault(), Fault(status=503), Fault(cut_after=300), Fault(truncate_to=2000), Fault(status=500)]
    url = f"{proxy.url}/{tmp_path.name}"
    found = index_tars(url, out=tmp_path / "view", shards="{000000..000004}.tar")
    assert found.shards == manifest.shards
    assert not proxy.faults
    assert "attempt 2 of 5" in capsys.readouterr().err


def test_http_gives_up(others, nginx, faulty, quick, tmp_path):
    """A web server that keeps failing is a clear error, and no view is written."""
    folder, _ = others
    (nginx.folder / tmp_path.name).symlink_to(folder)
    proxy = faulty(nginx.url)
    proxy.faults = [Fault(status=503)] * 100
    with pytest.raises(OSError, match=r"cannot be read: tried 5 times"):
        index_tars(f"{proxy.url}/{tmp_path.name}", out=tmp_path / "view", shards="{000000..000004}.tar")
    assert not (tmp_path / "view").exists()


def test_check_remote_view(others, nginx, tmp_path):
    """A changed and a missing shard behind a remote view are found, and tars not in it are ignored."""
    folder, _ = others
    (nginx.folder / tmp_path.name).symlink_to(folder)
    url = f"{nginx.url}/{tmp_path.name}"
    index_tars(url, out=tmp_path / "view", shards="{000000..000004}.tar")
    data = bytearray((folder / "000001.tar").read_bytes())
    data[700] ^= 1
    (folder / "000001.tar").write_bytes(data)
    shutil.copy(folder / "000003.tar", folder / "000009.tar")  # not in the view, and no fault
    (folder / "000004.tar").unlink()
    wrong = check(str(tmp_path / "view"))
    assert [line.split(" ")[:2] for line in wrong] == [["000001.tar:", "its"], ["000004.tar:", "missing"]]
