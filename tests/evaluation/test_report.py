"""The report is one self-contained page, shows what it was given, and escapes every name."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bigtrain.evaluation.metrics import summary
from bigtrain.evaluation.report.overlays import Scale, Shown, heat, most_telling, overlay, rgb, shared_scale
from bigtrain.evaluation.report.report import write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page, fails where a tag closes what is not open, and keeps texts and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def picture(
    key: str = "a/1", *, novel: bool = True, score: float = 0.5, side: int = 28, with_map: bool = True
) -> Shown:
    """Make a grey picture with a rising 2 x 2 map."""
    score_map_hw = np.arange(4.0).reshape(2, 2) if with_map else None
    return Shown(key, ["Bag"], novel, score, Image.new("RGB", (side, side), "#808080"), score_map_hw)


def written(tmp_path, **changes) -> tuple[str, Page]:
    """Write a report of made-up scores and return its text, raw and parsed."""
    rng = np.random.default_rng(0)
    novel_N = np.repeat([False, True], [60, 40])
    score_N, other_N = rng.normal(size=100) + 2 * novel_N, rng.normal(size=100) + novel_N
    arguments = {
        "title": "Bags known",
        "results": {
            "metrics": summary(novel_N, score_N, resamples=50),
            "detector": "distillation",
            "dataset": "fashion",
            "known": ["Bag"],
            "novel": ["Coat", "Dress"],
            "seed": 7,
            "threshold": 1.0,
            "settings": {"lr": 0.001, "data": {"train": "shards/fashion"}},
        },
        "novel_N": novel_N,
        "score_N": score_N,
        "comparisons": {"nearest neighbour on pixels": (other_N, summary(novel_N, other_N, resamples=50))},
        "pictures": {"Most novel": [picture()]},
    } | changes
    write_report(tmp_path / "report.html", **arguments)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return text, page


def test_explained(tmp_path):
    """The report says how much of the floor's error is explained, where that is known."""
    assert "it explains" not in written(tmp_path)[1].text
    rng = np.random.default_rng(0)
    results = {"metrics": summary(np.repeat([False, True], [60, 40]), rng.normal(size=100), resamples=50)}
    results["explained"] = {"value": 0.4249, "low": 0.40, "high": 0.4501}
    results["explained_novel"] = {"value": -0.1, "low": -0.2, "high": 0.0}
    said = " ".join(written(tmp_path, results=results)[1].text.split())
    assert "it explains 42.5 % (95 % interval 40.0 to 45.0) on held-out known pictures" in said
    assert "and -10.0 % (-20.0 to 0.0) on the novel ones" in said


def test_self_contained(tmp_path):
    """The page needs nothing from elsewhere and runs nothing."""
    text, page = written(tmp_path)
    assert "http://" not in text and "https://" not in text
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "url(" not in text and "@import" not in text


def test_facts_and_settings(tmp_path):
    """The page says what was judged, against what, and with which settings."""
    _, page = written(tmp_path)
    shown = " ".join(page.text.split())
    for fact in ("Bags known", "fashion", "Bag (60 images)", "Coat, Dress (40 images)", "nearest neighbour on pixels"):
        assert fact in shown
    for setting in ("lr", "0.001", "data.train", "shards/fashion"):
        assert setting in shown


def test_metrics_table(tmp_path):
    """The table holds each figure's value and interval, of the detector and of the comparison."""
    novel_N = np.repeat([False, True], [60, 40])
    score_N = np.random.default_rng(1).normal(size=100) + novel_N
    found, other = summary(novel_N, score_N, resamples=50), summary(novel_N, -score_N, resamples=50)
    _, page = written(
        tmp_path, results={"metrics": found}, score_N=score_N, comparisons={"flipped": (-score_N, other)}, pictures={}
    )
    shown = " ".join(page.text.split())
    for result in (found, other):
        for name in ("auroc", "aupr_in", "aupr_out", "fpr_at_95_tpr_novel", "fpr_at_95_tpr_known", "detection_error"):
            value, low, high = (f"{100 * result[name][end]:.1f}" for end in ("value", "low", "high"))
            assert f"{value} {low} \u2013 {high}" in shown


def test_beaten_by_comparison(tmp_path):
    """The page says so where a comparison beats the detector, and only there."""
    novel_N = np.repeat([False, True], 20)
    poor_N, good_N = np.random.default_rng(0).normal(size=40), novel_N + np.linspace(0, 0.1, 40)
    poor, good = summary(novel_N, poor_N, resamples=10), summary(novel_N, good_N, resamples=10)
    beaten = {"results": {"metrics": poor}, "score_N": poor_N, "comparisons": {"pixels": (good_N, good)}}
    winning = {"results": {"metrics": good}, "score_N": good_N, "comparisons": {"pixels": (poor_N, poor)}}
    assert "does no better than pixels" in written(tmp_path, novel_N=novel_N, **beaten)[1].text
    assert "does no better than" not in written(tmp_path, novel_N=novel_N, **winning)[1].text


def test_chance_level(tmp_path):
    """The page says so where the detector cannot be told from chance, and only there."""
    novel_N = np.repeat([False, True], 20)
    chance_N, good_N = np.random.default_rng(0).normal(size=40), novel_N + np.linspace(0, 0.1, 40)
    for score_N, says in ((chance_N, True), (good_N, False)):
        results = {"metrics": summary(novel_N, score_N, resamples=50)}
        page = written(tmp_path, novel_N=novel_N, results=results, score_N=score_N, comparisons={})[1]
        assert ("cannot be told from chance" in page.text) == says


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}"])
def test_names_escaped(tmp_path, hostile):
    """Names from outside come out as text, never as markup, script or template."""
    novel_N = np.repeat([False, True], 10)
    score_N = np.arange(20.0)
    found = summary(novel_N, score_N, resamples=10)
    shown = Shown(hostile, [hostile], True, 1.0, Image.new("L", (8, 8)), None)
    text, page = written(
        tmp_path,
        title=hostile,
        results={"metrics": found, "detector": hostile, "known": [hostile], "settings": {hostile: hostile}},
        novel_N=novel_N,
        score_N=score_N,
        comparisons={hostile + "2": (score_N, found)},
        pictures={hostile: [shown]},
    )
    assert "<script" not in text
    assert [attributes for _, attributes in page.tags if "onerror" in attributes] == []
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert page.text.count(hostile) >= 8


def test_errors_marked(tmp_path):
    """Pictures on the wrong side of the threshold are marked as missed or as false alarms."""
    shown = [
        picture("right-novel", novel=True, score=1.1),
        picture("missed-novel", novel=True, score=1.0),  # the threshold itself is still known
        picture("right-known", novel=False, score=1.0),
        picture("wrong-known", novel=False, score=1.1),
    ]
    _, page = written(tmp_path, pictures={"All": shown})
    cards = re.findall(r"Bag [\d.]+\s+(known|novel) ?(missed|false alarm|)\s+(\S+)", page.text)
    assert cards == [
        ("novel", "", "right-novel"),
        ("novel", "missed", "missed-novel"),
        ("known", "", "right-known"),
        ("known", "false alarm", "wrong-known"),
    ]


def test_text_alternatives(tmp_path):
    """Each picture and each chart has a text alternative."""
    _, page = written(tmp_path, pictures={"Most novel": [picture(), picture("b/2", side=300)]})
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 and all(attributes["alt"] for attributes in images)
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("class") == "chart"]
    assert len(charts) == 3 and all(attributes["aria-label"] for attributes in charts)


def test_no_maps_or_pictures(tmp_path):
    """Pictures without maps and sections without pictures are fine."""
    _, page = written(tmp_path, pictures={"Most novel": [picture(with_map=False)], "Least novel": []})
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert "There are none." in page.text
    assert "Where the novelty lies" not in page.text


def test_failed_write(tmp_path):
    """A failed write leaves the old page as it was, and after the next one no other file remains."""
    written(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(ValueError, match="distinct names"):
        written(tmp_path, comparisons={"distillation": (np.zeros(100), {})})
    assert (tmp_path / "report.html").read_bytes() == before
    written(tmp_path, title="Another")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_deterministic(tmp_path):
    """Two writes of the same report are the same bytes."""
    assert written(tmp_path)[0] == written(tmp_path)[0]


def test_comparison_length(tmp_path):
    """Comparison scores that are not one for each image are refused."""
    with pytest.raises(ValueError, match="one entry for each image"):
        written(tmp_path, comparisons={"pixels": (np.arange(99.0), {})})


def test_comparison_name(tmp_path):
    """A comparison named like the detector is refused."""
    with pytest.raises(ValueError, match="distinct names"):
        written(tmp_path, comparisons={"distillation": (np.arange(100.0), {})})


def test_most_telling():
    """The most telling pictures are the extremes and the worst errors."""
    novel_N = np.array([False, False, True, True, False])
    assert most_telling(novel_N, np.array([0.1, 0.9, 0.2, 0.8, 0.5]), count=2) == {
        "Most novel": [1, 3],
        "Least novel": [0, 2],
        "Known pictures that look most novel": [1, 4],
        "Novel pictures that look least novel": [2, 3],
    }


def test_shared_scale():
    """One scale spans the maps of all pictures; without maps there is none, and a NaN is refused."""
    low, high = Shown("a", [], True, 0, rgb(Image.new("L", (4, 4))), np.zeros((2, 2))), picture()
    assert shared_scale([low, high]) == pytest.approx((0, 3), abs=0.1)
    assert shared_scale([picture(with_map=False)]) is None
    with pytest.raises(ValueError, match="1 of 1 patch scores"):
        shared_scale([Shown("a", [], True, 0, Image.new("L", (4, 4)), np.array([[np.nan]]))])


def test_heat_ends():
    """The heat colours end at the ends of their scale."""
    colours = heat(np.array([[-9.0, 0.0, 1.0, 9.0]]), Scale(0.0, 1.0))
    low, high = [0x0D, 0x08, 0x87], [0xF0, 0xF9, 0x21]
    assert colours.tolist() == [[low, low, high, high]]


def test_overlay_patches():
    """The overlay keeps each patch a square of one colour, in its place."""
    laid = np.asarray(overlay(Image.new("RGB", (28, 14)), np.array([[0.0, 0.0, 0.0, 1.0], [0.0] * 4]), Scale(0, 1)))
    height, width = laid.shape[:2]
    assert (height * 2, min(width, 168)) == (width, 168)
    bright = laid[..., 0] > 100
    assert bright[: height // 2, 3 * width // 4 :].all()
    assert bright.sum() == (height // 2) * (width // 4)
