"""The tar of a shard: headers as tarfile makes them, and hashes computed in a thread."""

import hashlib
import io
import tarfile

import pytest

from shards import tar_writer
from shards.duplicates import content_digest
from shards.tar_writer import TarWriter, header, tarfile_header


@pytest.mark.parametrize("name", ["a.jpg", "class_0/b-1.json", f"{'x' * 96}.jpg", "é.jpg"])
@pytest.mark.parametrize("size", [0, 1, 123456, 8**11 - 1])
def test_headers(name, size):
    """A header is the one that tarfile makes."""
    assert header(name, size) == tarfile_header(name, size, is_plain=True)


@pytest.mark.parametrize(("name", "size"), [(f"{'x' * 97}.jpg", 1), ("a.jpg", 8**11)])
def test_pax_headers(name, size):
    """What a plain header cannot say has a PAX header."""
    assert header(name, size) == tarfile_header(name, size, is_plain=False)


def test_hashes(monkeypatch):
    """Hashes are those of the file, and of each picture in order."""
    monkeypatch.setattr(tar_writer, "BATCH_BYTES", 2048)
    monkeypatch.setattr(tar_writer, "WAITING_BYTES", 5000)
    pictures = [bytes([n]) * (n * 37 % 5000) for n in range(60)]
    file = io.BytesIO()
    with TarWriter(file) as tar:
        offsets = [tar.add(f"{n:02d}.jpg", data, is_picture=True) for n, data in enumerate(pictures)]
        tar.add("59.json", b"{}")
        tar.close()
    found, written = tar.hashes(), file.getvalue()
    assert found.tar.hexdigest() == hashlib.sha256(written).hexdigest()
    assert found.pictures == [content_digest(data) for data in pictures]
    assert [written[at : at + len(data)] for at, data in zip(offsets, pictures, strict=True)] == pictures
    with tarfile.open(fileobj=io.BytesIO(written)) as read:
        assert read.getnames() == [f"{n:02d}.jpg" for n in range(60)] + ["59.json"]


def test_error_while_hashing(monkeypatch):
    """An error of the thread is raised where the hashes are asked for."""

    def fails(data):
        raise MemoryError

    monkeypatch.setattr(tar_writer, "content_digest", fails)
    with TarWriter(io.BytesIO()) as tar:
        tar.add("a.jpg", b"a", is_picture=True)
        tar.close()
    with pytest.raises(MemoryError):
        tar.hashes()
