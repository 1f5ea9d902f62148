"""`index`: shards that others made, described as they are."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.set_files import read_index, read_manifest
from shards.check import check
from shards.index_tars import index_tars
from shards.members import Digested, members


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    (tmp_path / "theirs").mkdir()
    return tmp_path / "theirs"


def test_webdataset_shards(theirs, paint, contents):
    """Shards written by webdataset are indexed without being changed."""
    with webdataset.ShardWriter(str(theirs / "s-%04d.tar"), maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write({"__key__": f"img{n:03d}", "jpg": paint(n, (10 + n, 8)), "cls": n % 3})
    before = contents(theirs)
    manifest = index_tars(theirs, ["ape", "bat", "cod"], name="zoo", split="val", licence="CC0")
    assert {name: data for name, data in contents(theirs).items() if name.endswith(".tar")} == before
    assert (manifest.dataset, manifest.split, manifest.licence) == ("zoo", "val", "CC0")
    assert [(shard.file, shard.samples) for shard in manifest.shards] == [
        ("s-0000.tar", 4),
        ("s-0001.tar", 4),
        ("s-0002.tar", 2),
    ]
    assert read_manifest(str(theirs)) == manifest
    for n, row in enumerate(read_index(str(theirs)).to_pylist()):
        tar = (theirs / manifest.shards[row["shard"]].file).read_bytes()
        assert tar[row["image_offset"] : row["image_offset"] + row["image_size"]] == paint(n, (10 + n, 8))
        assert (row["key"], row["width"], row["classes"]) == (f"img{n:03d}", 10 + n, [["ape", "bat", "cod"][n % 3]])
    assert check(str(theirs)) == []


def test_own_shards(animals, build_folder, tmp_path):
    """Indexing the shards of an own build gives the same index as the build did."""
    build_folder(animals, tmp_path / "out")
    built = read_index(str(tmp_path / "out"))
    for name in ("manifest.json", "index.parquet"):
        (tmp_path / "out" / name).unlink()
    index_tars(tmp_path / "out")
    assert read_index(str(tmp_path / "out")).equals(built)


def test_class_sources(theirs, paint):
    """A sample's classes come from its .json, .cls or .txt member."""
    picture = paint()
    write_tar(
        theirs / "a.tar",
        {
            "a/1.JPG": picture,
            "a/1.json": b'{"classes": ["dog", "cat", "dog"]}',
            "a/2.jpg": picture,
            "a/2.json": b'{"label": 7}',
            "a/3.jpg": picture,
            "a/3.json": b'{"class": "owl"}',
            "a/4.jpg": picture,
            "a/4.cls": b"12",
            "a/5.seg.png": picture,
            "a/5.webp": picture,
            "a/5.txt": b" fox\n",
            "__meta__.json": b"{}",
            "README": b"",
        },
    )
    assert index_tars(theirs).classes == ("7", "12", "cat", "dog", "fox", "owl")
    rows = read_index(str(theirs)).to_pylist()
    assert [row["classes"] for row in rows] == [["cat", "dog"], ["7"], ["owl"], ["12"], ["fox"]]
    assert [row["image_ext"] for row in rows] == ["jpg", "jpg", "jpg", "jpg", "webp"]


def test_caption(theirs, paint):
    """A text beside a JSON is a caption, not a class."""
    write_tar(theirs / "a.tar", {"1.jpg": paint(), "1.json": b'{"url": "x"}', "1.txt": b"a dog on a lawn"})
    assert index_tars(theirs).classes == ()
    assert read_index(str(theirs))["classes"].to_pylist() == [[]]


def test_classes_from_folder(theirs, paint, tmp_path, capsys):
    """Folders in a tar become classes where asked for; otherwise the option is pointed out."""
    write_tar(theirs / "a.tar", {"all/cat/1.jpg": paint(), "all/dog/1.jpg": paint(1), "all/dog/1.txt": b"text"})
    assert index_tars(theirs, classes_from="folder").classes == ("cat", "dog")
    assert read_index(str(theirs))["classes"].to_pylist() == [["cat"], ["dog"]]
    assert capsys.readouterr().err == ""
    write_tar(theirs / "a.tar", {"cat/1.jpg": paint(), "dog/1.jpg": paint(1)})
    assert index_tars(theirs, out=tmp_path / "view").classes == ()
    assert "with --classes-from folder" in capsys.readouterr().err


def test_picture_without_folder(theirs, paint):
    """With classes from folders, a picture in no folder is refused, as it has no class."""
    write_tar(theirs / "a.tar", {"cat/1.jpg": paint(), "2.jpg": paint(1)})
    with pytest.raises(ValueError, match=r"1 sample has no class and others have one .a\.tar: 2"):
        index_tars(theirs, classes_from="folder")


@pytest.mark.parametrize(("ext", "samples", "warned"), [("txt", 3, True), ("cls", 51, True), ("cls", 50, False)])
def test_caption_warning(theirs, paint, capsys, ext, samples, warned):
    """Labels that may be captions (texts, or nearly one for each sample) are warned of."""
    members = [
        (f"{n}.{e}", paint() if e == "jpg" else f"no {n}".encode()) for n in range(samples) for e in ("jpg", ext)
    ]
    write_tar(theirs / "a.tar", members)
    index_tars(theirs)
    said = capsys.readouterr().err
    assert ("not classes to train on" in said) == warned
    assert ("3 samples took a class from .txt, and there are 3 classes" in said) == (ext == "txt")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["1.jpg", "2.jpg", "1.cls", "2.cls"], "'1' comes again .its members lie apart"),
        (["1.jpg", "1.cls", "2.cls"], "2 has 0 pictures"),
        (["1.jpg", "1.png", "1.cls"], "1 has 2 pictures"),
        (["1.jpg", "1.cls", "2.jpg"], "1 sample has no class and others have one .a.tar: 2"),
        (["1.jpg", "1.cls", "1.cls"], "1 has 1 pictures among its members .jpg, cls, cls"),
    ],
)
def test_bad_members(theirs, paint, names, sentence):
    """Interleaved, missing and surplus members are named, and nothing is written."""
    write_tar(theirs / "a.tar", [(name, paint() if name[2:] in ("jpg", "png") else b"1") for name in names])
    with pytest.raises(ValueError, match=sentence):
        index_tars(theirs)
    assert [path.name for path in theirs.iterdir()] == ["a.tar"]


def test_a_key_in_two_shards_is_named(theirs, paint):
    for name in ("a.tar", "b.tar"):
        write_tar(theirs / name, {"1.jpg": paint()})
    with pytest.raises(ValueError, match=r"b\.tar: the key '1' comes again \(also in a\.tar\)"):
        index_tars(theirs)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [(b'{"label": 5}', "class 5, and --class-names names 0 .. 1"), (b'{"label": 1.5}', "neither"), (b"{", "1.json: ")],
)
def test_bad_label(theirs, paint, label, sentence):
    """A label that is no known class, or that cannot be read, is refused with the reason."""
    write_tar(theirs / "a.tar", {"1.jpg": paint(), "1.json": label})
    with pytest.raises(ValueError, match=sentence):
        index_tars(theirs, ["a", "b"])


def test_skipped_picture(theirs, paint):
    """A member that is no real picture is skipped and listed, and `check` accepts that."""
    write_tar(theirs / "a.tar", {f"{n}.jpg": paint(n) if n != 5 else b"nothing" for n in range(9)})
    assert index_tars(theirs).samples == 8
    assert json.loads((theirs / "skipped.jsonl").read_text())["source"] == "a.tar:5.jpg"
    assert check(str(theirs)) == []


@pytest.mark.parametrize(
    ("mode", "name"), [("w:gz", "a.tar.gz"), ("w:gz", "a.tar"), ("w:xz", "a.tar"), ("w:bz2", "a.tar")]
)
def test_compressed_tars_are_refused(theirs, mode, name):
    with tarfile.open(theirs / name, mode):
        pass
    with pytest.raises(ValueError, match="is compressed"):
        index_tars(theirs)


@pytest.mark.parametrize("keep", [700, 1000, 1100, 1536])
def test_truncated_tar(theirs, keep):
    """A truncated tar is refused, wherever it is cut."""
    write_tar(theirs / "a.tar", {"1.txt": b"x" * 100, "2.txt": b"y" * 100})
    (theirs / "a.tar").write_bytes((theirs / "a.tar").read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"not a whole tar|0 pictures"):
        index_tars(theirs)


def test_existing_manifest(theirs, paint: Callable[..., bytes]):
    """A set that has a manifest already is not described again."""
    write_tar(theirs / "a.tar", {"1.jpg": paint()})
    index_tars(theirs)
    with pytest.raises(ValueError, match=r"has a manifest\.json already"):
        index_tars(theirs)


def test_view_elsewhere(theirs, paint, contents, tmp_path):
    """A view written elsewhere leaves the folder of the tars alone, and has the same index."""
    for name in ("a.tar", "b.tar"):
        write_tar(theirs / name, {f"{name[0]}{n}.jpg": paint(n) for n in range(3)})
    before = contents(theirs)
    manifest = index_tars(theirs, out=tmp_path / "views" / "one", workers=2)
    assert contents(theirs) == before
    assert (manifest.shards_at, manifest.dataset) == ("../../theirs", "theirs")
    assert check(str(tmp_path / "views" / "one")) == []
    index_tars(theirs)
    assert read_index(str(theirs)).equals(read_index(str(tmp_path / "views" / "one")))


@pytest.mark.parametrize(
    ("shards", "sentence"),
    [
        ("a-{0..2}.zip", "names 'a-0.zip'"),
        ("../a.tar", "names '../a.tar'"),
        ("{a,a}.tar", "gives 2 names, 1 of them different"),
        ("a-{000000000..999999999}.tar", "gives 1000000000 names"),
        ("a-{0..2.tar", "nbalanced braces"),
        ("none-{0..1}.tar", "none-0.tar"),
    ],
)
def test_bad_shard_list(theirs, paint, shards, sentence):
    """A list of shards that makes no sense is refused, and nothing is written."""
    write_tar(theirs / "a.tar", {"1.jpg": paint()})
    with pytest.raises((ValueError, OSError), match=sentence):
        index_tars(theirs, shards=shards)
    assert [path.name for path in theirs.iterdir()] == ["a.tar"]


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("member", "sentence"),
    [
        (tarfile.TarInfo("../../up.jpg"), "'../../up.jpg' leads out of the folder"),
        (tarfile.TarInfo("/etc/up.jpg"), "'/etc/up.jpg' leads out of the folder"),
        (tarfile.TarInfo("a/..\\b.jpg"), "leads out of the folder"),
        (special("a.jpg", tarfile.SYMTYPE), "'a.jpg' is a link"),
        (special("a.jpg", tarfile.LNKTYPE), "'a.jpg' is a link"),
        (special("a.jpg", tarfile.CHRTYPE), "'a.jpg' is a device"),
        (special("a.jpg", tarfile.FIFOTYPE), "'a.jpg' is a device"),
        (special("a.jpg", tarfile.GNUTYPE_SPARSE), "'a.jpg' is a sparse file"),
        (tarfile.TarInfo("a\n.jpg"), "cannot be printed"),
    ],
)
def test_unsafe_tar(theirs, paint, member, sentence):
    """A tar with links, devices, sparse files or unsafe names is refused, naming the member."""
    write_tar(theirs / "a.tar", {"1.jpg": paint()})
    with tarfile.open(theirs / "a.tar", "a", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(member)
    with pytest.raises(ValueError, match=rf"a\.tar is refused: its member .*{re.escape(sentence)}"):
        index_tars(theirs)
    assert [path.name for path in theirs.iterdir()] == ["a.tar"]


def test_pickled_members(theirs, paint, tmp_path, capsys):
    """Pickled members are counted and never opened."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    trap = pickle.dumps(Trap())
    write_tar(
        theirs / "a.tar", {"1.jpg": paint(), "1.pyd": trap, "1.pth": trap, "2.jpg": paint(1), "2.feature.pth": trap}
    )
    assert index_tars(theirs).samples == 2
    assert "1 .pyd" in (said := capsys.readouterr().out)
    assert "2 .pth" in said
    assert said.count("never opened") == 1
    assert check(str(theirs)) == []
    assert not (tmp_path / "sprung").exists()


@settings(max_examples=300)
@given(st.data())
def test_fuzz_tar(data):
    """A mutated tar raises a `TarError` at worst, and never gives more members than blocks."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a/1.jpg", "a/1.json", "x" * 120 + ".jpg", "b\u00e4.txt"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(b"7" * 700))
    tar_bytes = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(tar_bytes) - 1))
        tar_bytes[place] = data.draw(st.integers(0, 255))
    block = data.draw(st.integers(0, len(tar_bytes) // 512 - 1)) * 512
    if data.draw(st.booleans()):  # a size of our own, negative or huge, with a checksum that fits
        size = data.draw(st.integers(-(2**62), 2**62))
        tar_bytes[block + 124 : block + 136] = size.to_bytes(12, "big", signed=True)
        tar_bytes[block + 124] = 0x80 if size >= 0 else 0xFF
        tar_bytes[block + 148 : block + 156] = b" " * 8
        tar_bytes[block + 148 : block + 156] = b"%06o\0 " % sum(tar_bytes[block : block + 512])
    for opened in (io.BytesIO(tar_bytes), Digested(io.BytesIO(tar_bytes))):
        with contextlib.suppress(tarfile.TarError):
            assert len(list(members(opened))) <= len(tar_bytes) // 512


def test_long_extension(theirs, paint):
    """A picture may have a longer extension, such as .rgb.jpg, where there is no plain one."""
    write_tar(
        theirs / "a.tar", {"1.rgb.jpg": paint(1), "1.cls": b"0", "2.jpg": paint(2), "2.mask.png": b"", "2.cls": b"1"}
    )
    index_tars(theirs)
    rows = read_index(str(theirs)).to_pylist()
    assert [(row["key"], row["image_ext"], row["image_size"]) for row in rows] == [
        ("1", "jpg", len(paint(1))),
        ("2", "jpg", len(paint(2))),
    ]
    assert check(str(theirs)) == []


@pytest.mark.parametrize("label", [b'{"label": null}', b'{"caption": "a dog"}', b"{}"])
def test_allow_unlabelled(theirs, paint, label):
    """Samples without a class among labelled ones are refused unless they are allowed."""
    write_tar(theirs / "a.tar", {"1.jpg": paint(1), "1.json": label, "2.jpg": paint(2), "2.json": b'{"label": 1.0}'})
    with pytest.raises(ValueError, match=r"1 sample has no class and others have one \(a.tar: 1 .*--allow-unlabelled"):
        index_tars(theirs)
    assert index_tars(theirs, allow_unlabelled=True).classes == ("1",)
    assert [row["classes"] for row in read_index(str(theirs)).to_pylist()] == [[], ["1"]]


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (b'{"label": -1}', "1.json: has class -1, and classes count from 0"),
        (rb'{"label": "\ud800"}', r"1.json: .*'\\ud800'.* UTF-8"),
    ],
)
def test_invalid_label(theirs, paint, label, sentence):
    """A label that can be no class, negative or not UTF-8, is refused with the member's name."""
    write_tar(theirs / "a.tar", {"1.jpg": paint(), "1.json": label})
    with pytest.raises(ValueError, match=sentence):
        index_tars(theirs)


def test_half_a_picture_is_found(theirs, paint):
    whole = paint(1, (300, 200))
    write_tar(theirs / "a.tar", {"1.jpg": whole[: len(whole) // 2], "1.cls": b"0", "2.jpg": whole, "2.cls": b"0"})
    index_tars(theirs)
    assert [row["key"] for row in read_index(str(theirs)).to_pylist()] == ["2"]
    assert json.loads((theirs / "skipped.jsonl").read_text())["key"] == "1"
    assert check(str(theirs)) == []


def test_empty_tar(theirs):
    """Tars without a single sample are refused as such."""
    write_tar(theirs / "a.tar", {})
    with pytest.raises(ValueError, match="holds no sample: give the folder"):
        index_tars(theirs)
