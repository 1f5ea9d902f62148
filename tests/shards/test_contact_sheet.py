"""The contact sheet: which pictures it takes, what it draws, and that nothing in it can run."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bigtrain.data.schema import INDEX_FILE, MANIFEST_FILE, Manifest, Shard
from bigtrain.data.set_files import INDEX_SCHEMA
from shards.contact_sheet import choose, write_page
from shards.members import members
from shards.shards_cli import main
from shards.split import split_shares

Members = Sequence[tuple[str, bytes]]


def picture(size: tuple[int, int] = (40, 30), kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (20, 120, 200)).save(file, kind, **options)
    return file.getvalue()


def mask(size: tuple[int, int], marked: tuple[int, int, int, int]) -> bytes:
    pixels = np.zeros((size[1], size[0]), np.uint8)
    left, top, right, bottom = marked
    pixels[top:bottom, left:right] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def record(*boxes: list[Any], source: str = "from here") -> bytes:
    return json.dumps({"classes": [], "boxes": boxes, "source": source}).encode()


@pytest.fixture
def write_set(tmp_path: Path) -> Callable[..., str]:
    """A set of one tar with these members in this order: {key: (classes, [(ext, bytes), ...])}."""

    def written(
        samples: dict[str, tuple[list[str], Members]], size: tuple[int, int] = (40, 30), classes: Sequence[str] = ()
    ) -> str:
        folder = tmp_path / "set"
        folder.mkdir()
        with tarfile.open(folder / "000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for key, (_, parts) in samples.items():
                for ext, data in parts:
                    info = tarfile.TarInfo(f"{key}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        with (folder / "000000.tar").open("rb") as file:
            at = {member.key: member for member in members(file) if member.is_image and "mask" not in member.ext}
        rows = [
            {
                "key": key,
                "shard": 0,
                "image_offset": at[key].offset,
                "image_size": at[key].size,
                "image_ext": at[key].ext,
                "width": size[0],
                "height": size[1],
                "classes": shown,
            }
            for key, (shown, _) in samples.items()
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), folder / INDEX_FILE)
        names = classes or sorted({name for shown, _ in samples.values() for name in shown})
        shard = Shard("000000.tar", len(rows), (folder / "000000.tar").stat().st_size, "0" * 64)
        (folder / MANIFEST_FILE).write_text(Manifest("toy", "train", tuple(names), "none", (shard,)).to_json())
        return str(folder)

    return written


class Read(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[Image.Image]:
        return [
            Image.open(io.BytesIO(base64.b64decode(a["href"].partition(",")[2])))  # type: ignore[union-attr]
            for a in self.all("image")
        ]


def page_of(url: str, tmp_path: Path, **options: Any) -> Read:
    write_page(url, tmp_path / "page.html", **options)
    return Read((tmp_path / "page.html").read_text())


def boxes_of(page: Read) -> list[tuple[float, ...]]:
    light = [a for a in page.all("rect") if "light" in (a.get("class") or "")]
    return [tuple(float(a[name]) for name in ("x", "y", "width", "height")) for a in light]  # type: ignore[arg-type]


def test_boxes(write_set, tmp_path):
    """Boxes are drawn in pixels of the picture, the larger first, and their classes are named."""
    json_ = record([2, 4, 20, 30, "cat"], [0, 0, 30, 40, "dog"])
    page = page_of(write_set({"a": (["cat", "dog"], [("png", picture()), ("json", json_)])}), tmp_path)
    assert boxes_of(page) == [(0, 0, 40, 30), (4, 2, 26, 18)]  # the larger first, so that it hides none
    assert {a["viewbox"] for a in page.all("svg") if a.get("role")} == {"0 0 40 30"}
    assert re.search(r"cat \W 1", page.text)
    assert re.search(r"dog \W 1", page.text)
    assert "from here" in page.text
    assert "40 x 30" in page.text


def test_exif_orientation(write_set, tmp_path):
    """A picture turned by its EXIF stands upright under its boxes."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    jpeg = picture((30, 40), "JPEG", exif=exif)
    samples = {"a": (["cat"], [("jpg", jpeg), ("json", record([0, 0, 30, 40, "cat"]))])}
    page = page_of(write_set(samples), tmp_path)
    assert page.pictures()[0].size == (40, 30)
    assert {a["viewbox"] for a in page.all("svg") if a.get("role")} == {"0 0 40 30"}
    assert "says otherwise" not in page.text


def test_mask_overlay(write_set, tmp_path):
    """A mask is drawn as a tint with an outline, and its share of the picture is stated."""
    parts = [("png", picture()), ("json", record()), ("mask.png", mask((40, 30), (10, 10, 20, 16)))]
    page = page_of(write_set({"a": (["crack"], parts)}), tmp_path)
    overlay = np.asarray(page.pictures()[1])
    scale = overlay.shape[1] // 40
    opacity = overlay[..., 3]
    rows, columns = np.nonzero(opacity)
    assert (rows.min() // scale, rows.max() // scale) == (10, 15)
    assert (columns.min() // scale, columns.max() // scale) == (10, 19)
    assert opacity[10 * scale, 10 * scale] > opacity[13 * scale, 15 * scale] > 0
    assert "mask: 5 % of the picture" in page.text


def test_single_pixel_mask(write_set, tmp_path):
    """One marked pixel of a large picture can be seen."""
    size = (2000, 1500)
    parts = [("png", picture(size)), ("json", record()), ("mask.png", mask(size, (700, 701, 701, 702)))]
    page = page_of(write_set({"a": (["crack"], parts)}, size), tmp_path)
    assert np.asarray(page.pictures()[1])[..., 3].any()


def test_bad_masks(write_set, tmp_path):
    """A mask of another size and a damaged one are named and not drawn."""
    samples = {
        "a": (["crack"], [("png", picture()), ("mask.png", mask((10, 10), (0, 0, 5, 5)))]),
        "b": (["crack"], [("png", picture()), ("mask.png", b"no png")]),
    }
    page = page_of(write_set(samples), tmp_path)
    assert "its mask is 10 x 10 and is not drawn" in page.text
    assert "its mask cannot be read" in page.text


def test_distant_members(write_set, tmp_path, monkeypatch):
    """Members before a picture and far after it are found, and those of adjacent samples are not used."""
    monkeypatch.setattr("shards.read_samples.BEHIND", 4 * 512)
    noise = np.random.default_rng(0).integers(0, 2, (300, 400), np.uint8) * 255
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert len(file.getvalue()) > 10 * 512
    box = record([1, 2, 3, 4, "cat"], source="its own")
    samples = {
        "before": (["cat"], [("png", picture()), ("json", record(source="another"))]),
        "a": (["cat"], [("cls", b"3"), ("json", box), ("png", picture((400, 300))), ("mask.png", file.getvalue())]),
        "behind": (["cat"], [("json", record(source="another")), ("png", picture())]),
    }
    url = write_set(samples, (400, 300))
    index = pq.read_table(Path(url) / INDEX_FILE)
    pq.write_table(index.slice(1, 1), Path(url) / INDEX_FILE)
    page = page_of(url, tmp_path)
    assert "its own" in page.text
    assert "another" not in page.text
    assert boxes_of(page) == [(2, 1, 2, 2)]
    assert "mask: 50 % of the picture" in page.text


def test_no_json(write_set, tmp_path):
    """Pictures without JSON are counted."""
    samples = {"a": (["cat"], [("png", picture()), ("cls", b"0")]), "b": (["cat"], [("png", picture())])}
    assert "2 of these pictures have no json" in page_of(write_set(samples), tmp_path).text


def test_bad_boxes(write_set, tmp_path):
    """Invalid boxes are counted by kind of error."""
    wrong = [[1, 2, 3], [0, 0, "x", 9, "cat"], [0, 0, 1e999, 9, "cat"], [0, 0, 5, 90, "cat"], [9, 9, 9, 12, "cat"]]
    page = page_of(write_set({"a": (["cat"], [("png", picture()), ("json", record(*wrong))])}), tmp_path)
    assert "3 of 5 boxes are no [top, left, bottom, right, class]" in page.text
    assert "1 of 2 boxes reach beyond the picture" in page.text
    assert "1 of 2 boxes are empty" in page.text


def test_unreadable_picture(write_set, tmp_path):
    """A picture that cannot be read becomes a named placeholder."""
    samples = {
        "good": (["cat"], [("png", picture()), ("json", record())]),
        "broken": (["cat"], [("png", picture()[:-30]), ("json", record(source="its file"))]),
    }
    assert write_page(write_set(samples), tmp_path / "page.html") == (2, 1)
    page = Read((tmp_path / "page.html").read_text())
    assert len(page.pictures()) == 1
    for word in ("cannot be shown", "broken", "its file"):
        assert word in page.text


def test_broken_shard(write_set, tmp_path):
    """A shard that is missing or cut short leaves placeholders that name it."""
    url = write_set({"a": (["cat"], [("png", picture()), ("json", record())])})
    tar = Path(url) / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:530])
    assert "000000.tar ends before the picture does" in page_of(url, tmp_path).text
    tar.unlink()
    assert "000000.tar cannot be read" in page_of(url, tmp_path).text


def test_escaping_and_csp(write_set, tmp_path):
    """No name becomes markup, and the page's Content-Security-Policy lets nothing run."""
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>\ud800'
    shown = evil.replace("\ud800", "")
    json_ = json.dumps({"source": evil, "boxes": [[1, 1, 20, 20, evil]]}).encode()
    url = write_set({"a": ([shown], [("png", picture()), ("json", json_)])})
    manifest = Manifest(shown, shown, (shown,), shown, (Shard("000000.tar", 1, 10240, "0" * 64),))
    (Path(url) / MANIFEST_FILE).write_text(manifest.to_json())
    index = pq.read_table(Path(url) / INDEX_FILE)
    pq.write_table(index.set_column(0, "key", pa.array([shown])), Path(url) / INDEX_FILE)
    page = page_of(url, tmp_path)
    assert not {"script", "img", "iframe", "link", "object", "form"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)</script>") > 5
    links = {a[name] for tag, a in page.tags for name in ("href", "src") if name in a}
    assert all(link and link.startswith(("data:image/", "#")) for link in links)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_pixel_modes(write_set, tmp_path):
    """Pictures of 16 bits, in grey, with a palette or with transparency are shown in their colours."""
    deep = np.full((30, 40), 40000, np.uint16)
    samples = {}
    for name, image in {
        "deep": Image.fromarray(deep),
        "grey": Image.new("L", (40, 30), 156),
        "palette": Image.new("RGB", (40, 30), (156, 156, 156)).quantize(4),
        "clear": Image.new("RGBA", (40, 30), (156, 156, 156, 255)),
    }.items():
        file = io.BytesIO()
        image.save(file, "PNG")
        samples[name] = (["cat"], [("png", file.getvalue()), ("json", record())])
    for shown in page_of(write_set(samples), tmp_path).pictures():
        assert np.abs(np.asarray(shown.convert("RGB"), int) - 156).max() <= 1


classes_of_rows = st.lists(st.sets(st.sampled_from("abcd"), max_size=3).map(sorted), min_size=1, max_size=40)


@given(classes_of_rows, st.integers(1, 50), st.integers(0, 3))
@settings(deadline=None, max_examples=80)
def test_choose(shown, count, seed):
    """Each picture is chosen at most once, for a class that it shows."""
    at = {"shard": 0, "image_offset": 0, "image_size": 1, "image_ext": "png", "width": 1, "height": 1}
    rows = [{"key": str(n), "classes": names, **at} for n, names in enumerate(shown)]
    groups = choose(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), [*"abcd", ""], count, seed)
    taken = [row for group in groups for row in group.rows]
    assert len(taken) == len(set(taken)) == min(count, len(shown))
    for group in groups:
        assert all(group.name in (shown[row] or [""]) for row in group.rows)
        assert group.images == sum(group.name in (names or [""]) for names in shown)


def test_equal_parts(animals, build_folder, tmp_path):
    """Classes get equal parts of the page, which may be limited to some classes."""
    build_folder(animals, tmp_path / "out")
    page = page_of(str(tmp_path / "out"), tmp_path, count=6)
    keys = re.findall(r"^(cat|dog|emu)/", page.text, re.MULTILINE)
    assert Counter(keys)["cat"] == Counter(keys)["dog"] == Counter(keys)["emu"]
    assert "6 of 21 pictures" in page.text
    only = page_of(str(tmp_path / "out"), tmp_path, count=6, classes=["dog"])
    assert "dealt to\n1 of 1 classes" in only.text
    assert len(only.pictures()) == 6
    assert "cat/" not in only.text


def test_a_page_from_the_command_line(write_set, tmp_path, capsys):
    url = write_set({"a": (["cat"], [("png", picture())]), "b": (["cat"], [("png", b"none")])})
    assert main(["show", url, "--page", str(tmp_path / "page.html"), "--classes", "cat"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith(f"{tmp_path}/page.html: 2 pictures, ")
    assert said[-1] == "1 of them cannot be shown; the page says why."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "set"]


def test_seed(animals, build_folder, tmp_path):
    """The same seed gives the same page, and another seed another."""
    build_folder(animals, tmp_path / "out")
    pages = []
    for seed in (1, 1, 2):
        write_page(str(tmp_path / "out"), tmp_path / "page.html", count=6, seed=seed)
        pages.append((tmp_path / "page.html").read_text().replace(f"seed {seed}", ""))
    assert pages[0] == pages[1] != pages[2]


def test_view_and_remote(write_set, tmp_path):
    """A view and a remote set give pages too."""
    samples = {f"k{n}": (["cat"], [("png", picture()), ("json", record([1, 2, 3, 4, "cat"]))]) for n in range(4)}
    url = write_set(samples)
    split_shares(url, tmp_path / "parts", [("a", Fraction("0.5")), ("b", Fraction("0.5"))], 0)
    assert len(boxes_of(page_of(str(tmp_path / "parts" / "a"), tmp_path))) == 2
    memory = fsspec.filesystem("memory")
    memory.put(url, "/page-test", recursive=True)
    try:
        assert len(boxes_of(page_of("memory://page-test", tmp_path))) == 4
    finally:
        memory.rm("/page-test", recursive=True)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--page index.parquet", "does not end in .html"),
        ("--page nowhere/page.html", "a folder that exists"),
        ("--page page.html --classes owl", "no class 'owl'"),
        ("--page page.html --classes emu", "no picture of emu"),
        ("--page page.html --count 0", "not a whole number"),
    ],
)
def test_usage_errors(write_set, tmp_path, monkeypatch, capsys, line, sentence):
    """A mistake on the command line is answered by one sentence, and no page is written."""
    url = write_set({"a": (["cat"], [("png", picture())])}, classes=("cat", "emu"))
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(["show", url, *line.split()])
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    assert sentence in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
