"""What the report says beyond its figures, and several runs in one page: by hand, by reference, by simulation."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import precision_recall_curve, roc_curve

from bigtrain.cli import main
from bigtrain.detectors.calibration import Calibration
from bigtrain.evaluation.metrics import auroc, summary
from bigtrain.evaluation.report.report import write_report
from bigtrain.evaluation.report.sections import (
    bands,
    by_class,
    class_rows,
    course,
    p_value_chart,
    precision_points,
    threshold_rows,
)
from bigtrain.evaluation.report.several import delong_difference, paired


def some(seed=0, known=120, novel=80, apart=1.0):
    rng = np.random.default_rng(seed)
    novel_N = np.arange(known + novel) >= known
    return novel_N, np.round(rng.normal(size=known + novel) + apart * novel_N, 2)


def test_bands_hold_the_curves():
    """The ROC curve lies inside of its band, which narrows with more pictures; a band of few does not vanish."""
    widths = []
    for times in (1, 16):
        novel_N, score_N = some(known=60 * times, novel=60 * times)
        roc_P3, precision_P3 = bands(novel_N, score_N)
        fpr, tpr, _ = roc_curve(novel_N, score_N)
        on_grid = np.interp(roc_P3[:, 0], fpr, tpr)
        assert ((roc_P3[:, 1] - 0.02 <= on_grid) & (on_grid <= roc_P3[:, 2] + 0.02)).all()
        assert (precision_P3[:, 1] <= precision_P3[:, 2]).all()
        widths.append(float((roc_P3[:, 2] - roc_P3[:, 1]).mean()))
    assert widths[0] > 2.5 * widths[1] > 0


def test_precision_points():
    """They are scikit-learn's precision and recall, and few where there are many."""
    novel_N, score_N = some()
    precision, recall, _ = precision_recall_curve(novel_N, score_N)
    ours = {(round(x, 12), round(y, 12)) for x, y in precision_points(novel_N, score_N)}
    theirs = {(round(x, 12), round(y, 12)) for x, y in zip(recall[:-1], precision[:-1], strict=True)}
    assert ours == theirs
    assert len(precision_points(*some(known=5000, novel=5000))) <= 500


def test_class_rows_by_hand():
    """The worst class first, with its AUROC against the other kind and its errors at the threshold."""
    classes = [["cat"], ["cat"], ["dog"], ["dog"], ["owl"], ["cat", "owl"]]
    novel_N = np.array([False, False, True, True, True, False])
    score_N = np.array([1.0, 2, 3, 4, 1.5, 0.5])
    rows = class_rows(classes, novel_N, score_N, 2.5)
    assert [row[:4] for row in rows] == [
        ["owl", "novel", "1", "66.7"],
        ["cat", "known", "3", "88.9"],
        ["dog", "novel", "2", "100.0"],
        ["owl", "known", "1", "100.0"],
    ]
    assert rows[0][4].startswith("100.0 % missed (") and rows[1][4].startswith("0.0 % false alarms (")
    assert len(class_rows(classes, novel_N, score_N, None)[0]) == 4
    assert class_rows([[], []], np.array([True, False]), np.array([1.0, 0.0]), None)[0][0] == "no class"


def test_threshold_rows():
    """What was wanted, promised and given."""
    calibration = Calibration.of(np.arange(100), "")
    novel_N = np.array([False] * 10 + [True] * 4)
    score_N = np.array([*range(90, 100), 50, 99, 99, 99.0])
    rows = threshold_rows(calibration, 94.0, 0.95, novel_N, score_N)
    assert rows[0][1] == "5 %" and "100 held-out" in rows[1][0]
    assert rows[2][1].startswith("5 of 10: 50.0 %") and rows[3][1].startswith("1 of 4: 25.0 %")
    assert threshold_rows(calibration, None, 0.95, novel_N, score_N) == []


def test_p_value_chart():
    """Of pictures like the held-out ones the curve follows the diagonal; without held-out scores there is none."""
    rng = np.random.default_rng(0)
    calibration = Calibration.of(rng.normal(size=2000), "")
    chart = str(p_value_chart(calibration, np.zeros(2000, bool), rng.normal(size=2000)))
    points = chart.split('class="curve series-0" points="')[1].split('"')[0].split()
    xy = np.array([[float(value) for value in point.split(",")] for point in points])
    down, across = (xy[:, 1] - xy[0, 1]) / (xy[-1, 1] - xy[0, 1]), (xy[:, 0] - xy[0, 0]) / (xy[-1, 0] - xy[0, 0])
    assert np.abs(down - across).max() < 0.06
    assert p_value_chart(Calibration(), np.zeros(3, bool), np.zeros(3)) is None


def test_course(tmp_path):
    """Stages of log.jsonl with their waits; torn lines and infinite losses are left out."""
    lines = [
        {"stage": "tune", "step": s, "loss": 1 / s, "data_wait_percent": 10, "images_per_s": 50} for s in (1, 2, 3)
    ]
    text = "\n".join(
        map(json.dumps, [*lines, {"stage": "tune", "event": "saved"}, {"stage": "x", "step": 1, "loss": 1}])
    )
    (tmp_path / "log.jsonl").write_text(text + '\n{"stage": "tune", "step": 4, "loss": Infinity}\n{"sta')
    ((name, chart, said),) = course(tmp_path / "log.jsonl")
    assert name == "tune" and "polyline" in chart and said == "10 % of the time waiting for data, 50 images/s"
    assert course(tmp_path / "none.jsonl") == []


def test_by_class():
    found = by_class([["a"], ["a"], ["a"], ["b"], []], np.array([3.0, 1.0, 2.0, 9.0, 0.0]))
    assert found == {"a": [0, 2, 1], "b": [3]}


def test_delong_difference_by_bootstrap():
    """Its interval is that of a bootstrap that draws the same pictures for both scores."""
    novel_N, one_N = some(3, 300, 200)
    two_N = one_N + np.random.default_rng(4).normal(size=500)
    found = delong_difference(novel_N, one_N, two_N)
    assert found.value == pytest.approx(auroc(novel_N, two_N).value - auroc(novel_N, one_N).value)
    rng, drawn = np.random.default_rng(5), []
    known, novel = np.flatnonzero(~novel_N), np.flatnonzero(novel_N)
    for _ in range(800):
        at = np.concatenate([rng.choice(known, len(known)), rng.choice(novel, len(novel))])
        drawn.append(auroc(novel_N[at], two_N[at]).value - auroc(novel_N[at], one_N[at]).value)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)


def test_paired_is_narrower():
    """Scores that differ little have small differences, though each one's own interval is wide; equal ones none."""
    novel_N, one_N = some(6)
    near = paired(novel_N, one_N, one_N + np.random.default_rng(7).normal(0, 0.05, 200))
    own = summary(novel_N, one_N)
    for name, its in near.items():
        assert its.high - its.low < 0.7 * (own[name]["high"] - own[name]["low"]), name
        assert its.low <= its.value <= its.high
    same = paired(novel_N, one_N, one_N)
    assert all((its.low, its.value, its.high) == (0, 0, 0) for its in same.values())


def run_folder(folder, score_N, novel_N, detector=None, split="test"):
    folder.mkdir(parents=True)
    rows = [
        {"key": f"k{n:04d}", "split": split, "classes": ["<i>x</i>"], "novel": bool(novel), "score": float(score)}
        | ({"detector": detector} if detector else {})
        for n, (score, novel) in enumerate(zip(score_N, novel_N, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "scores.parquet")
    return folder


def test_report_of_several(tmp_path, capsys):
    """Figures of each, differences to the first, curves; names are text; runs of other pictures are refused."""
    novel_N, one_N = some(1)
    one = run_folder(tmp_path / "<b>one", one_N, novel_N)
    two = run_folder(tmp_path / "two", one_N + novel_N, novel_N, detector="best of <all>")
    assert main(["report", str(one), str(two), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<b>one" not in page and "&lt;b&gt;one" in page and "two: best of &lt;all&gt;" in page
    difference = paired(novel_N, one_N, one_N + novel_N)["auroc"]
    assert f"{100 * difference.value:+.1f} *" in page and page.count('<svg class="chart"') == 2
    again = run_folder(tmp_path / "deeper" / "two", one_N, novel_N)  # of the same name
    assert main(["report", str(two), str(again), "--out", str(tmp_path / "same.html")]) == 0
    assert str(again) in (tmp_path / "same.html").read_text()
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"path": ["a"], "score": [1.0]}), tmp_path / "table" / "scores.parquet")
    other = run_folder(tmp_path / "other", one_N, ~novel_N)
    train = run_folder(tmp_path / "train", one_N, novel_N, split="train")
    capsys.readouterr()
    for runs, said in (
        ([one, other], "call different pictures novel"),
        ([one, train], "was judged on no test split"),
        ([tmp_path], "holds no scores.parquet"),
        ([tmp_path / "table"], "is not of a run that was judged"),
    ):
        assert main(["report", *map(str, runs), "--out", str(tmp_path / "no.html")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "no.html").exists()
    assert main(["report", str(one), "--out", str(tmp_path / "no.txt")]) == 2


def test_many_images_make_a_small_page(tmp_path):
    """A report of 100 000 images and 1000 classes stays far below 20 MB."""
    novel_N, score_N = some(2, 60_000, 40_000)
    score_N = score_N + np.random.default_rng(0).normal(0, 0.001, len(score_N))
    classes_N = [[f"class {n % 1000}"] for n in range(100_000)]
    write_report(
        tmp_path / "report.html", title="Many", results={"metrics": summary(novel_N, score_N), "threshold": 1.5},
        novel_N=novel_N, score_N=score_N, comparisons={}, pictures={}, classes_N=classes_N,
        calibration=Calibration.of(score_N[~novel_N][:5000], ""),
    )  # fmt: skip
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
