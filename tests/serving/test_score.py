"""`bigtrain score`: the run's own scores, every kind of source, stopped and continued, and what is refused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import bigtrain
from bigtrain.serving.table_files import read_table
from shards.shards_cli import main as shards_command
from tests.launching import ENVIRONMENT, ROOT

COMMAND = [sys.executable, "-m", "bigtrain.cli"]


def key_of(path):
    return path.rpartition("/")[2].removesuffix(".png")


def test_scores_are_the_run_s(finished, photos, test_rows, tmp_path, command):
    """Each picture once, the very bits of the run's evaluation; p-values and decisions by its held-out scores."""
    code, said, _ = command("score", "--detector", finished, "--images", photos, "--out", tmp_path / "s.parquet")
    assert code == 0
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert list(rows[0]) == ["path", "score", "p_value", "novel", "class", "why_not"]
    assert {key_of(r["path"]): r["score"] for r in rows} == {r["key"].replace("/", "-"): r["score"] for r in test_rows}
    held_out = [r["score"] for r in pq.read_table(finished / "scores.parquet").to_pylist() if r["split"] == "held_out"]
    threshold = json.loads((finished / "results.json").read_text())["threshold"]["value"]
    for row in rows:
        as_high = sum(score >= row["score"] for score in held_out)
        assert row["p_value"] == pytest.approx((1 + as_high) / (len(held_out) + 1))
        assert row["novel"] == (row["score"] > threshold)
    assert f"{len(rows)} pictures" in said and "above the threshold" in said


def test_kinds_of_tables(finished, photos, tmp_path, command):
    """Parquet, CSV and JSON lines hold the same values."""
    tables = []
    for ending in ("parquet", "csv", "jsonl"):
        out = tmp_path / f"s.{ending}"
        assert command("score", "--detector", finished, "--images", photos / "bag", "--out", out)[0] == 0
        tables.append(list(read_table(out)))
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) > 5


def test_sources(finished, photos, shards, test_rows, tmp_path, command, monkeypatch):
    """A pattern, a file, a shard set, one of its tars, and names on standard input."""
    files = sorted(map(str, (photos / "bag").glob("*.png")))

    def scored(images, **further):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        code, *_ = command("score", "--detector", finished, "--images", images, "--out", out)
        assert code == 0
        return {row["path"]: row["score"] for row in read_table(out)}

    by_folder = scored(photos / "bag")
    assert list(by_folder) == files
    assert scored(f"{photos}/bag/*.png") == by_folder
    assert scored(files[0]) == {files[0]: by_folder[files[0]]}
    of_run = {row["key"]: row["score"] for row in test_rows}
    assert of_run.items() <= scored(shards / "test").items()
    # a set built of the files, whole or by a tar of it, scores as the files do
    line = ["build", "folder", "--root", photos, "--out", tmp_path / "set", "--workers", "1"]
    assert shards_command(list(map(str, line))) == 0
    assert sorted(scored(tmp_path / "set" / "000000.tar").values()) == sorted(of_run.values())
    listing = tmp_path / "names"
    listing.write_text("\n".join(files[:3]) + "\n\n")
    with listing.open("rb") as stdin:
        monkeypatch.setattr(sys, "stdin", type("In", (), {"buffer": stdin}))
        assert list(scored("-")) == files[:3]


def test_unreadable_pictures(finished, photos, broken, tmp_path, command):
    """What cannot be read has a row that says why, is named and counted, and the exit code is 3; others are scored."""
    folder = tmp_path / "mixed"
    shutil.copytree(photos / "coat", folder)
    for name, payload in broken.items():
        (folder / name).write_bytes(payload)
    (folder / "notes.txt").write_text("no picture")
    whole = len(list(folder.iterdir())) - len(broken) - 1
    code, said, _ = command("score", "--detector", finished, "--images", folder, "--out", tmp_path / "s.csv")
    assert code == 3
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert sum(bool(row["score"]) for row in rows) == whole
    why = {key_of(row["path"]): row["why_not"] for row in rows if not row["score"]}
    assert why["empty"] == "not a picture: the file is empty" and why["bomb"].startswith("too many pixels")
    assert f"{len(broken)} could not be read" in said and "1 files are no pictures by their names" in said
    again, said, _ = command("score", "--detector", finished, "--images", folder, "--out", tmp_path / "s.csv")
    assert again == 3 and "is finished, nothing to do" in said


def test_killed_and_continued(finished, photos, tmp_path):
    """After SIGKILL the same command continues: no picture is lost or doubled, what is written is not scored again."""
    many = tmp_path / "many"
    many.mkdir()
    files = sorted(photos.rglob("*.png"))
    for number in range(1500):
        os.link(files[number % len(files)], many / f"{number:05d}.png")
    line = [*COMMAND, "score", "--detector", finished, "--images", many, "--out", tmp_path / "s.parquet"]
    process = subprocess.Popen(list(map(str, line)), env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    parts, until = tmp_path / "s.parquet.unfinished", time.monotonic() + 100
    while not list(parts.glob("rows-*.jsonl")) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = {part: part.stat().st_mtime_ns for part in parts.glob("rows-*.jsonl")}
    assert kept and not (tmp_path / "s.parquet").exists()
    done = subprocess.run(
        list(map(str, line)), env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = pq.read_table(tmp_path / "s.parquet").column("path").to_pylist()
    assert names == sorted(map(str, many.iterdir())) and not parts.exists()
    assert f"{1500 - sum(256 for _ in kept)} of them now" in done.stdout


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_processes(finished, photos, tmp_path, launcher):
    """Two processes share the pictures, by either launcher's variables, and give the table of one."""
    many = tmp_path / "many"
    many.mkdir()
    files = sorted(photos.rglob("*.png"))
    for number in range(600):
        os.link(files[number % len(files)], many / f"{number:05d}.png")
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    }
    line = [*COMMAND, "score", "--detector", finished, "--images", many, "--out", tmp_path / "s.jsonl"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            list(map(str, line)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, **dict(zip(names[launcher], (str(rank), "2", str(rank)), strict=True))},
        )
        for rank in (1, 0)
    ]  # fmt: skip
    said = [process.communicate(timeout=100) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    rows = {row["path"]: row["score"] for row in read_table(tmp_path / "s.jsonl")}
    detector = bigtrain.load_detector(finished, device="cpu")
    np.testing.assert_array_equal(list(rows.values()), detector.score(sorted(many.iterdir())))


def test_resume_adds_new_pictures(finished, photos, tmp_path, command):
    """--resume scores what has come since, and keeps the rows that were there."""
    folder = tmp_path / "growing"
    shutil.copytree(photos / "dress", folder)
    line = ["score", "--detector", finished, "--images", folder, "--out", tmp_path / "s.csv"]
    assert command(*line)[0] == 0
    before = list(read_table(tmp_path / "s.csv"))
    for file in sorted((photos / "shirt").iterdir())[:3]:
        shutil.copy(file, folder / f"zz-{file.name}")
    assert "nothing to do; --resume adds" in command(*line)[1]
    code, said, _ = command(*line, "--resume")
    after = list(read_table(tmp_path / "s.csv"))
    assert code == 0 and after[: len(before)] == before and len(after) == len(before) + 3
    assert "3 of them now" in said


def test_thresholds_and_real_rates(finished, photos, tmp_path, command):
    """--threshold by rate or score; where classes are known, the rates that it really gave."""
    line = ["score", "--detector", finished, "--images", photos, "--known", "ankle_boot"]
    code, said, _ = command(*line, "--threshold", "false-alarms=0.4", "--out", tmp_path / "a.jsonl")
    rows = list(read_table(tmp_path / "a.jsonl"))
    assert code == 0 and all(row["novel"] == (row["p_value"] <= 0.4) for row in rows)
    known = [row for row in rows if "/ankle_boot/" in row["path"]]
    flagged = sum(row["novel"] for row in known)
    assert f"{flagged} of {len(known)} known pictures were flagged" in said
    missed = sum(not row["novel"] for row in rows if "/ankle_boot/" not in row["path"])
    assert f"{missed} of {len(rows) - len(known)} novel pictures were missed" in said
    middle = float(np.median(bigtrain.load_detector(finished, device="cpu").calibration.score_N))
    code, *_ = command(*line, "--threshold", f"score={middle!r}", "--out", tmp_path / "b.jsonl")
    assert code == 0 and all(row["novel"] == (row["score"] > middle) for row in read_table(tmp_path / "b.jsonl"))


def test_maps_page_and_copies(finished, photos, tmp_path, command):
    """Overlays and arrays for each picture, copies and links of the novel ones, a page of the most novel; names of
    pictures lead nowhere and stay text."""
    folder = tmp_path / "in"
    shutil.copytree(photos / "trouser", folder)
    first = sorted(folder.iterdir())[0]
    hostile = folder / "<img src=x onerror=alert(1)>.png"
    shutil.copy(first, hostile)
    out = {name: tmp_path / name for name in ("maps", "raw", "copies", "links")}
    line = ["score", "--detector", finished, "--images", folder, "--out", tmp_path / "s.jsonl", "--top", 4]
    line += [
        "--maps",
        out["maps"],
        "--maps-raw",
        out["raw"],
        "--copy-novel",
        out["copies"],
        "--link-novel",
        out["links"],
    ]
    code, *_ = command(*line, "--page", tmp_path / "top.html")
    rows = list(read_table(tmp_path / "s.jsonl"))
    assert code == 0 and len(list(out["maps"].iterdir())) == len(list(out["raw"].iterdir())) == len(rows)
    detector = bigtrain.load_detector(finished, device="cpu")
    raw = np.stack([np.load(file) for file in sorted(out["raw"].iterdir())])
    np.testing.assert_array_equal(raw, detector.score_map([row["path"] for row in rows]))
    novel = [row["path"] for row in rows if row["novel"]]
    assert [str(link.readlink()) for link in sorted(out["links"].iterdir())] == novel
    assert [file.read_bytes() for file in sorted(out["copies"].iterdir())] == [Path(n).read_bytes() for n in novel]
    page = (tmp_path / "top.html").read_text()
    assert page.count('<figure class="picture') == 4 and "<img src=x" not in page
    assert "onerror" not in page or "&lt;img src=x onerror" in page


def test_watch(finished, photos, tmp_path):
    """Pictures are judged as they come, each once; a half-copied one waits; a restart remembers."""
    folder, out = tmp_path / "inbox", tmp_path / "seen.csv"
    folder.mkdir()
    line = [*COMMAND, "score", "--watch", "--every", "0.2", "--detector", finished, "--images", folder, "--out", out]
    files = sorted(photos.rglob("*.png"))

    def watching(until_rows, then):
        process = subprocess.Popen(
            list(map(str, line)), env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )
        then()
        until = time.monotonic() + 60
        while time.monotonic() < until and (not out.exists() or out.read_text().count("\n") < until_rows + 1):
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
        return process.returncode, said

    def come():
        for number, file in enumerate(files[:5]):
            shutil.copy(file, folder / f"{number}.png")
        (folder / "half.png").write_bytes(files[6].read_bytes()[:200])

    code, said = watching(5, come)
    assert code == 0 and "watching" in said, said
    assert [Path(row["path"]).name for row in read_table(out)] == [f"{n}.png" for n in range(5)]

    def whole():
        (folder / "half.png").write_bytes(files[6].read_bytes())

    with out.open("a") as table:
        table.write("inbox/cut,0.")  # as a kill leaves it
    code, said = watching(6, whole)
    assert code == 0 and "5 pictures judged before" in said
    rows = list(read_table(out))
    assert len(rows) == len({row["path"] for row in rows}) == 6 and rows[-1]["path"].endswith("half.png")


def test_processes_of_a_job(finished, photos, tmp_path, command, monkeypatch):
    """A batch script alone is one process, whatever its job was given; a process of several that comes when the others
    have finished ends, and so does each when a finished table is asked for again."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    line = ["score", "--detector", finished, "--images", photos / "bag", "--out", tmp_path / "s.csv"]
    assert command(*line)[0] == 0 and (tmp_path / "s.csv").exists()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, said, _ = command(*line)
    assert code == 0 and said == ""


def test_odd_names(finished, photos, tmp_path, command, monkeypatch):
    """Addresses that are none, names with control characters or that are no UTF-8: a row each, on one line."""
    picture = next(photos.rglob("*.png"))
    names = [b"two\rlines.png", b"caf\xe9.png", b"turned\xe2\x80\xaeg.png"]
    for name in names:
        shutil.copy(picture, os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    listing = tmp_path / "names"
    further = [b"http://[x/y.png", b"ftp://h/caf\xe9.png", b"http://127.0.0.1/a.png"]
    listing.write_bytes(b"\n".join([os.fsencode(tmp_path) + b"/" + name for name in names] + further))
    for ending in ("csv", "jsonl", "parquet"):
        with listing.open("rb") as stdin:
            monkeypatch.setattr(sys, "stdin", type("In", (), {"buffer": stdin}))
            out = tmp_path / f"s.{ending}"
            assert command("score", "--detector", finished, "--images", "-", "--out", out)[0] == 3
        rows = list(read_table(out))
        assert [bool(row["why_not"]) for row in rows] == [False] * 3 + [True] * 3
        assert [key_of(row["path"]) for row in rows[:3]] == ["two\\rlines", "caf\\xe9", "turned\\u202eg"]
        assert ending == "parquet" or len(out.read_bytes().splitlines()) == 6 + (ending == "csv")


def test_linked_folders(finished, photos, tmp_path, command):
    """Folders that are links are read, each once; a loop ends."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "a").symlink_to(photos / "bag")
    (folder / "b").symlink_to(photos / "bag")
    (folder / "loop").symlink_to(folder)
    assert command("score", "--detector", finished, "--images", folder, "--out", tmp_path / "s.jsonl")[0] == 0
    assert len(list(read_table(tmp_path / "s.jsonl"))) == len(list((photos / "bag").iterdir()))


def test_no_number(finished, photos, tmp_path, command, monkeypatch):
    """A score that is no number is never called normal: its row says so, and the table is written."""
    from bigtrain.methods.defend.detector import DistillationDetector

    before = DistillationDetector.score_views

    def overflowing(self, image_B3HW):
        found = before(self, image_B3HW)
        found.score_B[1] = np.nan
        return found

    monkeypatch.setattr(DistillationDetector, "score_views", overflowing)
    line = ["score", "--detector", finished, "--images", photos / "bag", "--out", tmp_path / "s.jsonl"]
    assert command(*line)[0] == 3
    row = list(read_table(tmp_path / "s.jsonl"))[1]
    assert row["why_not"] == "its score is nan: look for an overflow in the network" and row["novel"] is None
    detector = bigtrain.load_detector(finished, device="cpu")
    with pytest.raises(ValueError, match=r"the score of picture 1 \(counted from 0\) is nan"):
        detector.as_estimator().predict(sorted((photos / "bag").iterdir()))


MISTAKES = {
    "no pictures": (["--images", "EMPTY"], "holds no pictures"),
    "nothing there": (["--images", "NOWHERE"], "does not exist"),
    "no match": (["--images", "EMPTY/*.png"], "nothing matches"),
    "no detector": (["--detector", "EMPTY"], "holds no detector.json"),
    "no ending": (["--out", "OUT/scores.txt"], "the ending says the kind of table"),
    "no folder": (["--out", "OUT/none/s.csv"], "does not exist: make it"),
    "another's table": (["--out", "OTHER"], "no summary beside it says what it is"),
    "p=0": (["--threshold", "p=0"], "lies above 0 and below 1"),
    "p too small": (["--threshold", "p=0.0001"], "at least 9999 are needed"),
    "score outside": (["--threshold", "score=1e9"], "lies outside of the scores"),
    "no threshold": (["--threshold", "high"], "is none: give p=0.05"),
    "batch 0": (["--batch", "0"], "must be at least 1"),
    "top 0": (["--top", "0"], "must be at least 1"),
    "private address": (["--images", "http://127.0.0.1:9/a.png"], "in a private network, which is not asked"),
    "private set": (["--images", "http://10.0.0.1/shards"], "in a private network, which is not asked"),
    "watch a file": (["--watch", "--images", "PICTURE"], "follows a folder"),
    "watch to parquet": (["--watch"], "must end in .csv or .jsonl"),
    "no folder of the page": (["--page", "OUT/none/p.html"], "its folder does not exist"),
    "links into a set": (["--images", "SET", "--link-novel", "OUT/l"], "are no files of their own"),
    "no device": (["--device", "cuda:99"], "is not available here"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, finished, photos, shards, tmp_path, command):
    """One sentence, exit code 2, nothing written."""
    flags, said = MISTAKES[name]
    work = tmp_path / "work"
    (work / "empty").mkdir(parents=True)
    (work / "other.csv").write_text("a,b\n")
    places = {"EMPTY": work / "empty", "NOWHERE": work / "nowhere", "OUT": work, "OTHER": work / "other.csv"}
    places["SET"] = shards / "test"
    places["PICTURE"] = next(photos.rglob("*.png"))
    given = {"--detector": finished, "--images": photos, "--out": work / "s.parquet"}
    words = []
    for flag in flags:
        for place, path in places.items():
            flag = flag.replace(place, str(path))
        words.append(flag)
    line = [part for flag, value in given.items() if flag not in words for part in (flag, value)]
    before = sorted(work.rglob("*"))
    code, _, error = command("score", *line, *words)
    assert code == 2 and said in error and error.count("\n") == 1, error
    assert sorted(work.rglob("*")) == before


def test_other_detector_s_table(finished, saved, photos, tmp_path, command):
    """A table of another detector, or of other pictures, is left as it is; so is the beginning of another job."""
    line = ["score", "--images", photos / "bag", "--out", tmp_path / "s.csv"]
    assert command(*line, "--detector", finished)[0] == 0
    before = (tmp_path / "s.csv").read_bytes()
    for further in (["--detector", saved], ["--detector", finished, "--threshold", "p=0.4"]):
        code, _, error = command(*line, *further)
        assert code == 2 and "holds scores of another" in error and "another name" in error
    assert (tmp_path / "s.csv").read_bytes() == before
    (tmp_path / "t.csv.unfinished").mkdir()
    (tmp_path / "t.csv.unfinished" / "job.json").write_text(
        json.dumps({"detector": "x", "images": "y", "threshold": ""})
    )
    code, _, error = command("score", "--images", photos, "--out", tmp_path / "t.csv", "--detector", saved)
    assert code == 2 and "holds the beginning of another job (x on y" in error


def test_full_disk(finished, photos, tmp_path, command, monkeypatch):
    """A full disk is one sentence; the table is not there, and the same command continues when there is space."""
    import errno

    from bigtrain.serving import score

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = ["score", "--detector", finished, "--images", photos / "bag", "--out", tmp_path / "s.csv"]
    with monkeypatch.context() as patched:
        patched.setattr(score, "write_table", full)
        code, _, error = command(*line)
    assert code == 2 and "no space is left on the disk" in error and not (tmp_path / "s.csv").exists()
    assert command(*line)[0] == 0 and (tmp_path / "s.csv").exists()


def test_threads_score_alike(finished, photos):
    """Four threads on one detector give the bits of one."""
    detector = bigtrain.load_detector(finished, device="cpu")
    files = sorted(photos.rglob("*.png"))[:40]
    expected = detector.score(files)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: detector.score(files), range(8)):
            np.testing.assert_array_equal(found, expected)


def test_judge(finished, photos, test_rows):
    """Score, p-value, decision and map from one pass; an error names the picture."""
    detector = bigtrain.load_detector(finished, device="cpu")
    files = sorted(photos.rglob("*.png"))[:7]
    judged = detector.judge(files)
    np.testing.assert_array_equal([each.score for each in judged], detector.score(files))
    np.testing.assert_array_equal([each.map_hw for each in judged], detector.score_map(files))
    assert [each.novel for each in judged] == [each.score > detector.scoring.threshold for each in judged]
    assert all(0 < each.p_value <= 1 and each.class_name is None for each in judged)
    with pytest.raises(ValueError, match=r"nowhere\.png cannot be scored"):
        detector.judge([files[0], "nowhere.png"])
    assert np.isnan(detector.judge([files[0], "nowhere.png"], unreadable="nan")[1].score)


def test_faces(finished, photos):
    """scikit-learn's face has its signs; the torch module gives the detector's scores and maps of its views."""
    import torch
    from sklearn.base import clone

    detector = bigtrain.load_detector(finished, device="cpu")
    files = sorted(photos.rglob("*.png"))[:20]
    scores, estimator = detector.score(files), detector.as_estimator()
    np.testing.assert_array_equal(estimator.score_samples(files), -scores)
    np.testing.assert_array_equal(estimator.predict(files), np.where(scores > detector.scoring.threshold, -1, 1))
    assert clone(estimator, safe=False).fit(files).predict(files[:2]).shape == (2,)
    views = torch.from_numpy(np.stack([detector.view()(p, None)["image"] for p in pictures(files)]))
    score_B, map_Bhw = detector.as_module()(views)
    np.testing.assert_allclose(score_B.numpy(), scores, rtol=1e-5)
    np.testing.assert_allclose(map_Bhw.numpy(), detector.score_map(files), rtol=1e-4, atol=1e-6)


def pictures(files):
    from bigtrain.data.decode import Picture

    return [Picture(file.read_bytes()) for file in files]


@pytest.mark.parametrize("resume", [False, True])
def test_killed_before_the_summary(finished, photos, tmp_path, command, monkeypatch, resume):
    """Killed between the table and its summary, a job continues, with or without rows of an earlier one, and neither
    doubles nor loses any."""
    from bigtrain.serving import score

    folder, out = tmp_path / "in", tmp_path / "s.csv"
    shutil.copytree(photos / "bag", folder)
    line = ["score", "--detector", finished, "--images", folder, "--out", out, "--resume"]
    if resume:
        assert command(*line)[0] == 0
        shutil.copy(next((photos / "coat").iterdir()), folder / "zz.png")
    with monkeypatch.context() as patched:
        patched.setattr(score, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(*line)
    assert out.exists() and (tmp_path / "s.csv.unfinished").exists()
    for _ in range(2):
        assert command(*line)[0] == 0
        assert [row["path"] for row in read_table(out)] == sorted(map(str, folder.iterdir()))
    assert not (tmp_path / "s.csv.unfinished").exists()
