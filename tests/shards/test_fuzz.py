"""Damaged and hostile input: each command ends with its own exit code, and writes nothing outside its folder.

BIGTRAIN_FUZZ=3000 runs so many examples of each test; the default is a quick sample of them.
"""

import io
import json
import os
import random
import tarfile
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bigtrain.data.decode import Picture
from bigtrain.images import UnreadableError
from shards.shards_cli import main
from tests.shards import fuzz

ENOUGH = settings(
    max_examples=int(os.environ.get("BIGTRAIN_FUZZ", "60")),
    deadline=5000,  # ms: nothing hangs
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
seeds = st.integers(0, 2**32)
SIZES = st.integers(1, 6)


def mutated(data, seed, times):
    """Bytes flipped, cut, doubled, removed or moved: another file for each seed."""
    rng, data = random.Random(seed), bytearray(data)
    for _ in range(times):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 2, 8, 100, 512, 3000]))
        match rng.randrange(6):
            case 0:
                data[at:end] = rng.randbytes(end - at)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                del data[at:]
            case 4:
                data[at:end] = rng.choice([b"\0", b"\xff", b"9", b"/", b"-", b'"', b"\n", b"../", b"7" * 12]) * 2
            case 5 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def painted(kind="JPEG", size=(24, 18)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(file, kind)
    return file.getvalue()


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


TAR = tar_of(
    (f"{number:03d}.{ext}", data)
    for number in range(4)
    for ext, data in (("jpg", painted()), ("json", b'{"label": "cat", "boxes": []}'), ("cls", b"3"))
)


@pytest.fixture
def place(tmp_path):
    """A new folder each time it is asked for, beside one that must stay as it is."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "file").write_text("untouched")
    count = iter(range(10**9))

    def made():
        folder = tmp_path / "area" / str(next(count))
        folder.mkdir(parents=True)
        return folder

    yield made
    assert {p.name for p in tmp_path.iterdir()} <= {"guard", "area"}
    assert [p.name for p in guard.iterdir()] == ["file"] and (guard / "file").read_text() == "untouched"


def ends_well(arguments, capsys, allowed=(0, 1, 2)):
    """The command's exit code; a mistake is one line that names it."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code in allowed
    assert "Traceback" not in said.err + said.out
    if code == 2:
        assert "bigtrain-shards: " in said.err.strip().splitlines()[-1]
    return code


@ENOUGH
@given(seed=seeds, times=SIZES)
def test_damaged_tar(place, capsys, seed, times):
    """A damaged tar is indexed or refused, and what is indexed passes `check`."""
    folder = place()
    (folder / "000.tar").write_bytes(mutated(TAR, seed, times))
    if ends_well(["index", folder], capsys) == 0:
        assert ends_well(["check", folder], capsys) == 0
        assert ends_well(["show", folder, "--page", folder / "page.html"], capsys) == 0
    else:
        assert not (folder / "manifest.json").exists()


@ENOUGH
@given(seed=seeds, times=SIZES, which=st.sampled_from(["tar", "index.parquet", "manifest.json"]))
def test_changed_set(place, built, capsys, seed, times, which):
    """Any change of a tar since its build is found by `check`, and no damaged file crashes a command."""
    folder = place()
    for path in built.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    victim = next(path for path in folder.iterdir() if path.name.endswith(which))
    before = victim.read_bytes()
    victim.write_bytes(mutated(before, seed, times))
    code = ends_well(["check", folder], capsys)
    if which == "tar":
        assert (code == 0) == (victim.read_bytes() == before)
    ends_well(["show", folder], capsys)
    ends_well(["split", folder, "--shares", "a=0.5", "b=0.5", "--out", folder / "views"], capsys)


@pytest.fixture
def built(tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("built")
    for number in range(6):
        path = folder / "pictures" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(painted())
    assert main(["build", "folder", "--root", str(folder / "pictures"), "--out", str(folder / "set")]) == 0
    return folder / "set"


@ENOUGH
@given(seed=seeds, times=SIZES, kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
def test_damaged_picture(seed, times, kind):
    """A damaged picture gives a view or a reason, within five seconds."""
    payload = mutated(painted(kind), seed, times)
    began = time.monotonic()
    try:
        picture = Picture(payload)
        (view,) = picture.cut([((0, 0, picture.height, picture.width), 8)])
        assert view.shape == (3, 8, 8)
    except UnreadableError as reason:
        assert str(reason)
    assert time.monotonic() - began < 5


@ENOUGH
@given(seed=seeds, times=SIZES)
def test_build_damaged_pictures(place, capsys, seed, times):
    """Damaged pictures are built or left out by name, and the set passes `check`."""
    folder = place()
    for number in range(3):
        path = folder / "pictures" / "a" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutated(painted(), seed + number, times) if number else painted())
    arguments = ["build", "folder", "--root", folder / "pictures", "--out", folder / "set", "--workers", 1]
    if ends_well([*arguments, "--max-skipped", 1], capsys) == 0:
        left_out = folder / "set" / "skipped.jsonl"
        named = [json.loads(line)["key"] for line in left_out.read_text().splitlines()] if left_out.exists() else []
        shards = json.loads((folder / "set" / "manifest.json").read_text())["shards"]
        assert sum(shard["samples"] for shard in shards) + len(named) == 3
        assert ends_well(["check", folder / "set"], capsys) == 0


COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 24, "height": 18}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 9], "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cat"}],
    }
).encode()
VOC = b"""<annotation><size><width>24</width><height>18</height></size><object><name>cat</name>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>9</ymax></bndbox></object></annotation>"""
IDX = b"\0\0\x08\x03\0\0\0\x02\0\0\0\x04\0\0\0\x04" + bytes(range(32))
LABELS = b"\0\0\x08\x01\0\0\0\x02\x03\x04"
LISTS = {
    "coco": [("annotations/instances_train2017.json", COCO), ("train2017/1.jpg", None)],
    "voc": [("Annotations/1.xml", VOC), ("ImageSets/Main/train.txt", b"1\n"), ("JPEGImages/1.jpg", None)],
    "mnist": [("train-images-idx3-ubyte", IDX), ("train-labels-idx1-ubyte", LABELS)],
    "table": [("t.csv", b"path,label\n1.jpg,cat\n"), ("1.jpg", None)],
}


@ENOUGH
@given(seed=seeds, times=SIZES, name=st.sampled_from(sorted(LISTS)))
def test_damaged_list(place, capsys, seed, times, name):
    """A damaged list of COCO, VOC, MNIST or a table is read or refused."""
    folder = place()
    lists = [path for path, data in LISTS[name] if data is not None]
    victim = lists[seed % len(lists)]
    for path, data in LISTS[name]:
        data = painted() if data is None else mutated(data, seed, times) if path == victim else data
        (folder / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / path).write_bytes(data)
    more = {"coco": ["--split", "train2017"], "table": ["--table", folder / "root" / "t.csv"]}.get(name, [])
    ends_well(["build", name, "--root", folder / "root", "--out", folder / "set", "--workers", 1, *more], capsys)
    assert {path.name for path in folder.iterdir()} <= {"root", "set"}


def made_in(kind, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((70, 56), Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return file.getvalue()


KINDS = [
    *(("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"), ("WEBP", "RGBA")),
    *(("BMP", "RGB"), ("GIF", "P"), ("TIFF", "CMYK"), ("TIFF", "LA"), ("PPM", "L"), ("AVIF", "RGB")),
]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
@given(seed=seeds)
@ENOUGH
def test_all_see_the_same(kind, mode, seed):
    """Whole or damaged, a picture is taken or refused by build, stream and page alike, with the same pixels."""
    data = (
        fuzz.mutated(made_in(kind, mode), made_in("PNG", "RGB"), random.Random(seed)) if seed else made_in(kind, mode)
    )
    assert not list(fuzz.disagreements(data))
