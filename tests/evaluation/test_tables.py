"""Finished runs become a table."""

import json
import math
import statistics

import pytest

from bigtrain.evaluation.tables import Result, mean_and_interval, read_results, rows, table


def put(folder, name, auroc):
    (folder / name).mkdir(parents=True)
    (folder / name / "results.json").write_text(json.dumps({"auroc": {"value": auroc}, "known": ["x"]}))


def write_sweep(folder, runs):
    rows = [{"name": name, "axes": axes, "shared": False} for name, axes in runs.items()]
    rows.append({"name": "teacher", "axes": {}, "shared": True})
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"runs": rows}))


def test_the_interval_is_students():
    """By hand: t(.975, 2) = 4.3027; the standard deviation of .8, .9, .85 is .05."""
    mean, low, high = mean_and_interval([0.8, 0.9, 0.85])
    assert mean == pytest.approx(0.85)
    half = 4.302653 * statistics.stdev([0.8, 0.9, 0.85]) / math.sqrt(3)
    assert (low, high) == (pytest.approx(0.85 - half), pytest.approx(0.85 + half))
    assert mean_and_interval([0.5]) == (0.5, None, None)


def test_mean_over_seeds(tmp_path):
    """The mean is over classes for each seed, and then over seeds."""
    runs = {f"{known}-s{seed}": {"known": known, "seed": seed} for known in ("a", "b|c") for seed in (0, 1)}
    write_sweep(tmp_path, runs)
    for name, auroc in zip(runs, (0.8, 0.6, 0.9, 0.9), strict=True):
        put(tmp_path, name, auroc)
    lines = table(read_results(tmp_path)).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["known", "auroc, %", "95 % interval", "seeds"]
    assert lines[2].startswith("| a ") and "70.0" in lines[2]
    assert "b\\|c" in lines[3] and "90.0 .. 90.0" in lines[3]
    assert lines[4].startswith("| mean ") and "80.0" in lines[4]  # of .85 and .75, one for each seed
    low, high = mean_and_interval([0.85, 0.75])[1:]
    assert f"{100 * low:.1f} .. {100 * high:.1f}" in lines[4]


def test_missing_run(tmp_path):
    """A missing run is named and leaves its seed out of the mean."""
    runs = {f"{known}-s{seed}": {"known": known, "seed": seed} for known in ("a", "b") for seed in (0, 1)}
    write_sweep(tmp_path, runs)
    for name, auroc in (("a-s0", 0.8), ("a-s1", 0.6), ("b-s0", 0.9)):
        put(tmp_path, name, auroc)
    text = table(read_results(tmp_path))
    assert text.endswith("1 of 4 runs are missing: b-s1")
    by_name = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "1 of 2" in by_name["b"] and "1 of 2" in by_name["mean"] and "85.0" in by_name["mean"]


def test_plain_figures(tmp_path):
    """With the plain figures each is a detector of its own; without, they are not shown."""
    write_sweep(tmp_path, {f"s{seed}": {"seed": seed} for seed in (0, 1)})
    for seed, (own, pixels) in enumerate(((0.8, 0.7), (0.6, 0.9))):
        put(tmp_path, f"s{seed}", own)
        figures = {"method": "DEFEND", "auroc": {"value": own}, "comparisons": {"pixels": {"auroc": {"value": pixels}}}}
        (tmp_path / f"s{seed}" / "results.json").write_text(json.dumps(figures))
    assert "pixels" not in table(read_results(tmp_path))
    lines = table(read_results(tmp_path, plain=True)).splitlines()
    found = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines[2:]}
    assert found == {"DEFEND": "70.0", "pixels": "80.0"}


def test_against(tmp_path):
    """Differences are taken in pairs, run by run, and then averaged as the figures are."""
    runs = {
        f"{known}-{row}-s{seed}": {"known": known, "row": row, "seed": seed}
        for known in ("a", "b")
        for row in ("plain", "new, masked")
        for seed in (0, 1)
    }
    write_sweep(tmp_path, runs)
    for name, auroc in zip(runs, (0.5, 0.7, 0.6, 0.9, 0.4, 0.4, 0.8), strict=False):  # the last run is missing
        put(tmp_path, name, auroc)
    lines = table(read_results(tmp_path), against="row=plain").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0][-2:] == ["minus plain", "95 % interval"]
    by_place = {(line[0], line[1]): line[-2:] for line in cells[2:]}
    low, high = mean_and_interval([0.1, 0.2])[1:]
    assert by_place["a", "new, masked"] == ["15.0", f"{100 * low:.1f} .. {100 * high:.1f}"]
    assert by_place["b", "new, masked"] == ["40.0", ""]
    assert by_place["mean", "new, masked"] == ["25.0", ""]  # of seed 0 alone: .1 and .4
    assert by_place["a", "plain"] == by_place["mean", "plain"] == ["", ""]
    with pytest.raises(ValueError, match=r"names no axis of these runs: .* known, row, seed"):
        table(read_results(tmp_path), against="student=plain")
    with pytest.raises(ValueError, match="they differ in none; with --plain there is the axis detector"):
        table([Result("only", {}, {"auroc": {"value": 0.5}})], against="row=plain")
    with pytest.raises(ValueError, match="no run has that row; there are plain; new, masked"):
        table(read_results(tmp_path), against="row=old")


def test_without_sweep(tmp_path):
    """Without a sweep, runs are told apart by the settings in which they differ."""
    for name, settings in (("one", {"known": ["a", "b"], "seed": 0}), ("two", {"known": ["a", "b"], "seed": 1})):
        put(tmp_path, name, 0.5)
        (tmp_path / name / "config.json").write_text(json.dumps({"settings": {**settings, "keep": "random"}}))
    found = read_results(tmp_path)
    assert [dict(result.axes) for result in found] == [{"seed": 0}, {"seed": 1}]
    assert "| 50.0" in table(found) and "50.0 .. 50.0" in table(found)


def test_no_runs_or_figure(tmp_path):
    """A folder without runs and an unknown figure are refused with a sentence."""
    with pytest.raises(ValueError, match="holds no runs"):
        read_results(tmp_path)
    write_sweep(tmp_path, {"x": {"seed": 0}})
    put(tmp_path, "x", 0.5)
    with pytest.raises(ValueError, match="no figure 'auruc': there are auroc"):
        table(read_results(tmp_path), "auruc")


def test_lacking_figure(tmp_path):
    """What lacks a figure is left out of that figure's table and named below it."""
    accuracy = {"max logit": {"auroc": {"value": 0.6}, "oscr": {"value": 0.4}}, "KNFST": {"auroc": {"value": 0.7}}}
    results = {
        "judged": {"method": "DEFEND", "auroc": {"value": 0.5}},
        "baselines": {"method": "baselines", "detectors": accuracy},
        "trained": {"top1": 0.3, "seed": 0},
    }
    for name, found in results.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "results.json").write_text(json.dumps(found))
        settings = {"seed": 0, name: 3}
        (tmp_path / name / "config.json").write_text(json.dumps({"settings": settings}))
    lines = table(read_results(tmp_path)).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:3]] == ["detector", "auroc, %"]  # no axis of the trained one
    assert len(lines) == 2 + 3 + 2 and lines[-1] == "1 without auroc are left out: trained"
    lines = table(read_results(tmp_path), "oscr").splitlines()
    assert len(lines) == 2 + 1 + 2 and "| max logit" in lines[2]
    assert lines[-1] == "3 without oscr are left out: baselines KNFST, judged DEFEND, trained"
    with pytest.raises(ValueError, match="no figure 'top1': there are auroc, oscr"):
        table(read_results(tmp_path), "top1")
    for name in ("judged", "baselines"):
        (tmp_path / name / "config.json").unlink()
    with pytest.raises(ValueError, match="none of the runs was judged"):
        table(read_results(tmp_path))


def test_several_detectors(tmp_path):
    """A run of several detectors has a line for each."""
    for seed, values in ((0, {"KNFST": 0.7, "OpenMax": 0.8}), (1, {"KNFST": 0.8, "OpenMax": 0.8})):
        (tmp_path / f"s{seed}").mkdir()
        (tmp_path / f"s{seed}" / "config.json").write_text(json.dumps({"settings": {"seed": seed}}))
        figures = {name: {"auroc": {"value": value}} for name, value in values.items()}
        (tmp_path / f"s{seed}" / "results.json").write_text(json.dumps({"method": "baselines", "detectors": figures}))
    (tmp_path / "s2").mkdir()  # not finished yet
    (tmp_path / "s2" / "config.json").write_text(json.dumps({"settings": {"seed": 2}}))
    lines = table(read_results(tmp_path)).splitlines()
    assert lines[-1] == "1 of 3 runs are missing: s2"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert [row[0] for row in cells] == ["KNFST", "OpenMax"] and [row[1] for row in cells] == ["75.0", "80.0"]
    assert all(row[-1] == "2 of 3" for row in cells)


def test_seed_in_setting(tmp_path):
    """Settings that differ only in an embedded seed share a row; names that merely end in a digit do not."""
    runs = {}
    for seed in (0, 1):
        for model in ("lite0", "lite1"):
            name = f"{model}-s{seed}"
            runs[name] = {"model": model, "finetuned": f"runs/s{seed}/net{seed}.safetensors", "seed": seed}
    write_sweep(tmp_path, runs)
    for number, name in enumerate(runs):
        put(tmp_path, name, 0.5 + 0.1 * number)
    names, found = rows(read_results(tmp_path), "auroc")
    assert names == ["model", "finetuned"]
    finetuned = "runs/s{seed}/net{seed}.safetensors"
    assert [(row.axes, row.seeds, round(row.estimate[0], 9)) for row in found] == [
        (("lite0", finetuned), 2, 0.6), (("lite1", finetuned), 2, 0.7),
    ]  # fmt: skip
    # with one seed only, a 0 in a name is left as it is
    only = [result for result in read_results(tmp_path) if result.axes["seed"] == 0]
    assert [row.axes[0] for row in rows(only, "auroc")[1]] == ["lite0", "lite1"]
