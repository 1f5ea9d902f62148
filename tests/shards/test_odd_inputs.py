"""What the field's bug reports are about: bytes behind a name, entries of others, labels and texts in every form."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigtrain.data.set_files import read_index, read_manifest
from bigtrain.data.shard_set import ShardSet
from bigtrain.images import UnreadableError, decode_rgb
from shards.check import check
from shards.index_tars import index_tars
from shards.labels import classes_of, names_of
from shards.shards_cli import main as command
from shards.treatment import Treatment, checked


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def samples(paint):
    """samples(first, last): members of so many samples, each a picture and a class."""
    return lambda first, last: [m for i in range(first, last) for m in ((f"{i}.jpg", paint(i)), (f"{i}.cls", b"2"))]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "data", [POSTSCRIPT, b"%PDF-1.4\n", b"\0\0\1\0\1\0", b"8BPS\0\1"], ids=["eps", "pdf", "ico", "psd"]
)
def test_other_formats(data, tmp_path, paint, build_folder, monkeypatch):
    """Bytes of another format are no picture, whatever their name; Pillow's plugin for it is never asked."""
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda self: pytest.fail("opened as PostScript"))
    with pytest.raises(UnreadableError, match="not a picture"):
        decode_rgb(data)
    for number in range(3):
        paint(number, path=tmp_path / "in" / "a" / f"{number}.jpg")
    (tmp_path / "in" / "a" / "odd.jpg").write_bytes(data)
    manifest = build_folder(tmp_path / "in", tmp_path / "out", max_skipped=0.5)
    assert manifest.samples == 3
    assert "not a picture" in (tmp_path / "out" / "skipped.jsonl").read_text()


@pytest.mark.parametrize(("kind", "ext"), [("AVIF", "avif"), ("HEIF", "heic"), ("JXL", "jxl")])
def test_newer_formats(kind, ext, tmp_path, build_folder):
    """Pictures of phones and newer sites are built, made smaller and seen as they are displayed."""
    pytest.importorskip({"HEIF": "pillow_heif", "JXL": "pillow_jxl"}.get(kind, "PIL"))
    decode_rgb(encoded(Image.new("RGB", (4, 4)), "PNG"))  # loads the plugins
    scene = np.zeros((40, 64, 3), np.uint8)
    scene[:20, :32] = 255
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / f"1.{ext}").write_bytes(encoded(Image.fromarray(scene), kind))
    build_folder(tmp_path / "in", tmp_path / "out")
    built = ShardSet(str(tmp_path / "out"))
    assert np.abs(decode_rgb(built.read([0])[0]).astype(int) - scene).mean() < 4
    small = decode_rgb(checked(built.read([0])[0], ext, Treatment(max_side=32)).encoded)
    assert small.shape == (20, 32, 3) and small[2, 2].min() > 240 and small[-3, -3].max() < 15


def test_unread_format(monkeypatch):
    """Where the library for a format is missing, the sentence says which extra brings it."""
    monkeypatch.setattr("bigtrain.images.readable_formats", lambda: ("JPEG", "PNG"))
    with pytest.raises(UnreadableError, match=r"HEIF is not read here: install bigtrain\[heif\]"):
        decode_rgb(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_dangling_links(animals, tmp_path, build_folder, contents):
    """A link that leads nowhere hides no file: the set is seen, another build is refused, nothing is overwritten."""
    build_folder(animals, tmp_path / "out")
    (tmp_path / "out" / ".lock").symlink_to("nobody@nowhere:1")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="begun with other settings"):
        build_folder(animals, tmp_path / "out", samples_per_shard=9)
    assert contents(tmp_path / "out") == before
    assert not check(str(tmp_path / "out"))
    assert len(ShardSet(str(tmp_path / "out"))) == 21


def test_files_of_others_stay(tmp_path, samples):
    """`index` and `split` remove what killed writers of their own files left behind, and nothing of others."""
    write_tar(tmp_path / "set" / "0.tar", samples(0, 8))
    (tmp_path / "set" / "1.tar.tmp").write_bytes(b"a download")
    (tmp_path / "set" / "cache.7.tmp").mkdir()
    dead = tmp_path / "set" / f"index.parquet.{socket.gethostname()}-999999999.tmp"
    dead.write_bytes(b"")
    mine = tmp_path / "view.backup-1.tmp"
    mine.mkdir()
    index_tars(tmp_path / "set")
    assert command(["split", str(tmp_path / "set"), "--shares", "a=0.5", "b=0.5", "--out", str(tmp_path / "view")]) == 0
    left = {path.name for path in (tmp_path / "set").iterdir()}
    assert {"1.tar.tmp", "cache.7.tmp"} <= left and dead.name not in left and mine.is_dir()


@pytest.mark.parametrize("behind", ["joined", "hole"])
def test_bytes_behind_the_end(tmp_path, samples, behind):
    """A tar that goes on behind the mark of its end is refused, and `check` finds it too."""
    first = write_tar(tmp_path / "a" / "0.tar", samples(0, 9)).read_bytes()
    if behind == "joined":
        data = first + write_tar(tmp_path / "b" / "0.tar", samples(9, 14)).read_bytes()
    else:
        middle = len(first) // 3 // 512 * 512
        data = first[:middle] + bytes(4096) + first[middle + 4096 :]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"mark of its end is at byte \d+, and there is more"):
        index_tars(tmp_path / "set")
    assert not (tmp_path / "set" / "index.parquet").exists()


def test_tar_of_another_build(tmp_path, build_folder):
    """Tars of equal sizes under the index of another order are found, by `check --quick` and when they are read."""
    for number in range(12):
        (tmp_path / "in" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "in" / "ab"[number % 2] / f"{number}.bmp")
    for seed in (3, 4):
        build_folder(tmp_path / "in", tmp_path / str(seed), samples_per_shard=12, shuffle_seed=seed)
    (tmp_path / "3" / "000000.tar").write_bytes((tmp_path / "4" / "000000.tar").read_bytes())
    assert "another picture" in check(str(tmp_path / "3"), quick=True)[0]
    with pytest.raises(OSError, match="other pictures than its index says"):
        ShardSet(str(tmp_path / "3")).read(range(12))


@pytest.mark.parametrize("turned", range(1, 9))
def test_turned_tiff(turned):
    """A TIFF is turned once: its size, and the smaller picture, are as it is displayed."""
    scene = np.zeros((40, 64, 3), np.uint8)
    scene[:12, :20] = (255, 80, 0)
    exif = Image.Exif()
    exif[0x112] = turned
    data = encoded(Image.fromarray(scene), "TIFF", exif=exif)
    shown = decode_rgb(data)
    assert checked(data, "tif", Treatment())[2:] == shown.shape[1::-1]
    small = decode_rgb(checked(data, "tif", Treatment(max_side=32)).encoded)
    expected = Image.fromarray(shown).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(np.asarray(expected, int) - small).mean() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16"])
def test_smaller_is_the_same_picture(mode):
    """A picture made smaller shows the colours that the kept one has, also under transparent pixels."""
    disc = np.hypot(*np.mgrid[-60:60, -60:60]) < 40
    picture = Image.fromarray(np.where(disc[..., None], (180, 40, 30), (250, 250, 250)).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        picture = picture.convert(mode)
        picture.putalpha(Image.fromarray((disc * 255).astype(np.uint8)))
    elif mode == "I;16":
        picture = Image.fromarray((np.asarray(picture.convert("L")).astype(np.uint16)) * 257)
    else:
        picture = picture.convert(mode)
    data = encoded(picture, "TIFF" if mode == "CMYK" else "PNG")
    small = decode_rgb(checked(data, "png", Treatment(max_side=60)).encoded)
    kept = Image.fromarray(decode_rgb(data)).resize((60, 60), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(kept, int) - small).mean() < 3


@pytest.mark.parametrize("made", [np.float32, np.int32], ids=["float", "int32"])
def test_refused_at_once(made, tmp_path, paint, build_folder):
    """Numbers without a range are refused by the build as they would be by the stream, and masks of them by name."""
    for number in range(4):
        paint(number, path=tmp_path / "in" / "a" / f"{number}.jpg")
    Image.fromarray(np.ones((12, 20), made)).save(tmp_path / "in" / "a" / "odd.tif")
    build_folder(tmp_path / "in", tmp_path / "out", max_skipped=0.5)
    assert "no given range" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_no_plain_file(tmp_path, paint, build_folder):
    """A pipe with the name of a picture is left out; reading it would wait for ever."""
    for number in range(3):
        paint(number, path=tmp_path / "in" / "a" / f"{number}.jpg")
    os.mkfifo(tmp_path / "in" / "a" / "pipe.jpg")
    assert build_folder(tmp_path / "in", tmp_path / "out", max_skipped=0.5).samples == 3


def test_labels_are_read_alike(tmp_path, paint):
    """3, 3.0 and "3" are one class; None, NaN and "" are none; what counts twice or below 0 is refused."""
    for label in (3, 3.0, "3", " 3 ", "3.0", [3], [3.0, None]):
        assert names_of(label) == ["3"]
    for nothing in (None, float("nan"), "", " ", [], [None]):
        assert names_of(nothing) == []
    assert names_of(["dog", "cat", "dog"]) == ["cat", "dog"]
    assert names_of("007") == ["007"]
    for wrong in ([0, 1, 0], [1, 1], -1, "-1", True, {"a": 1}, 2.5):
        with pytest.raises(ValueError, match=r"has (the )?class"):
            names_of(wrong)
    assert classes_of("cls", "\ufeff5\r\n".encode(), None) == ["5"]
    assert classes_of("json", b'\xef\xbb\xbf{"label": 1}', ["ant", "bee"]) == ["bee"]
    table = pa.table({"path": ["0.jpg", "1.jpg", "2.jpg"], "label": pa.array([1.0, float("nan"), 2.0])})
    pq.write_table(table, tmp_path / "t.parquet")
    for number in range(3):
        paint(number, path=tmp_path / "in" / f"{number}.jpg")
    line = ["build", "table", "--root", tmp_path / "in", "--table", tmp_path / "t.parquet", "--out", tmp_path / "out"]
    assert command(list(map(str, line))) == 0
    assert read_index(str(tmp_path / "out"))["classes"].to_pylist() == [["1"], [], ["2"]]


def test_one_hot_of_two(tmp_path, paint, capsys):
    """Where all samples show the same classes, their labels may be one-hot vectors of two: that is told."""
    labels = [[0, 1], [1, 0], [0, 1]]
    members = [
        m
        for i, label in enumerate(labels)
        for m in ((f"{i}.jpg", paint(i)), (f"{i}.json", json.dumps({"label": label}).encode()))
    ]
    write_tar(tmp_path / "set" / "0.tar", members)
    index_tars(tmp_path / "set")
    assert "one-hot" in capsys.readouterr().err


def test_every_member_is_told_of(tmp_path, samples, paint, capsys):
    """A picture that WebDataset reads is taken; what it passes over is counted by its reason."""
    more = [
        ("__7__.jpg", paint(7)),
        ("__7__.cls", b"2"),
        ("._0.jpg", b"mac"),
        ("README", b"x"),
        ("__meta__/a.json", b"{}"),
    ]
    write_tar(tmp_path / "set" / "0.tar", [*samples(0, 2), *more])
    (tmp_path / "set" / "._0.tar").write_bytes(b"Mac OS X")
    assert index_tars(tmp_path / "set").samples == 3
    assert "1 hidden, 1 named __...__, 1 without an extension" in capsys.readouterr().out


def test_check_of_others(tmp_path, paint):
    """`check` has no rules of our own form for what `index` took."""
    members = [
        ("x/0.jpg", paint(0)),
        ("x/0.json", b'{"classes": ["b", "a", "b"], "boxes": []}'),
        ("x/1.jpg", paint(1)),
        ("x/1.cls", b"a"),
    ]
    for name, classes_from in (("members", "members"), ("folder", "folder")):
        write_tar(tmp_path / name / "0.tar", members)
        index_tars(tmp_path / name, classes_from=classes_from)
        assert not check(str(tmp_path / name))


@pytest.mark.parametrize("name", ["\u0646\u0645\u06cc\u200c\u062f", "山\u3000田", "cat\u00a01", "👩\u200d🚀"])
def test_good_names(name, tmp_path, paint):
    """Names that Python does not call printable are names."""
    write_tar(tmp_path / "set" / "0.tar", [(f"{name}/0.jpg", paint(0)), ("cat/1.jpg", paint(1))])
    index_tars(tmp_path / "set", classes_from="folder")
    assert name in read_manifest(str(tmp_path / "set")).classes


def test_composed_names(tmp_path, paint, build_folder):
    """One name in two forms of Unicode is one class, in sets of both forms; both in one root are refused."""
    for form in ("NFC", "NFD"):
        paint(0, path=tmp_path / form / unicodedata.normalize(form, "köter") / "0.jpg")
        build_folder(tmp_path / form, tmp_path / f"s{form}")
    assert read_manifest(str(tmp_path / "sNFC")).classes == read_manifest(str(tmp_path / "sNFD")).classes == ("köter",)
    paint(0, path=tmp_path / "NFC" / unicodedata.normalize("NFD", "köter") / "1.jpg")
    with pytest.raises(ValueError, match="two classes 'köter'"):
        build_folder(tmp_path / "NFC", tmp_path / "both")


def test_flat_folder(tmp_path, paint, capsys):
    """A folder of pictures alone is a set without classes, or of the one that --class-name gives."""
    for number in range(3):
        paint(number, path=tmp_path / "in" / f"{number}.jfif")
    line = ["build", "folder", "--root", str(tmp_path / "in"), "--out"]
    assert command([*line, str(tmp_path / "none")]) == 0
    assert command([*line, str(tmp_path / "good"), "--class-name", "good"]) == 0
    assert read_manifest(str(tmp_path / "none")).classes == ()
    index = read_index(str(tmp_path / "good"))
    assert set(index["image_ext"].to_pylist()) == {"jpg"} and index["classes"].to_pylist() == [["good"]] * 3
    assert "3 pictures of" in capsys.readouterr().err


def test_keys_with_extension(tmp_path, paint):
    """a.jpg beside a.png: refused with the way out, which gives each a key of its own."""
    for kind, ext in (("JPEG", "JPG"), ("PNG", "png")):
        paint(0, kind=kind, path=tmp_path / "in" / "a" / f"z.{ext}")
    line = ["build", "folder", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert command(line) == 2
    assert command([*line, "--keys-with-extension"]) == 0
    assert read_index(str(tmp_path / "out"))["key"].to_pylist() == ["a/z_jpg", "a/z_png"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("path,label\na\\0.jpg,x\n", ["x"]),
        ("path, label\na/0.jpg, x y\n", ["x y"]),
        ("\ufeffpath,label\r\na/0.jpg,x\r\n", ["x"]),
    ],
    ids=["windows", "spaces", "mark"],
)
def test_tables_of_others(text, labels, tmp_path, paint):
    """Tables as Windows and spreadsheets write them."""
    paint(0, path=tmp_path / "a" / "0.jpg")
    for encoding in ("utf-8", "utf-16"):
        if encoding == "utf-16" and text.startswith("\ufeff"):
            continue
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        line = ["build", "table", "--root", tmp_path, "--table", tmp_path / "t.csv", "--out", tmp_path / encoding]
        assert command(list(map(str, line))) == 0
        assert read_index(str(tmp_path / encoding))["classes"].to_pylist() == [labels]


def test_show_on_pictures(animals, capsys):
    """A folder of pictures is told how to become shards beside it, never in it."""
    assert command(["show", str(animals)]) == 2
    said = capsys.readouterr().err
    assert f"--root {animals} --out {animals}-shards" in said


def test_long_labels(tmp_path, samples, monkeypatch):
    """A label member of unlikely size is refused before it is parsed."""
    monkeypatch.setattr("shards.survey.MAX_LABEL_BYTES", 100)
    write_tar(tmp_path / "set" / "0.tar", [*samples(0, 1), ("0.json", b" " * 200 + b"{}")])
    with pytest.raises(ValueError, match=r"0\.json has 202 bytes, too many for a label"):
        index_tars(tmp_path / "set")
