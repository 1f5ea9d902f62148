"""The command line: what it prints, and one sentence for a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.data.set_files import read_manifest
from bigtrain.text import counted
from shards.adapters import ADAPTERS
from shards.shards_cli import main


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake prints; argparse leaves by SystemExit, the rest by a returned code."""
    try:
        code: object = main(argv)
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("build flder --root R --out O", "Did you mean folder?"),
        ("bild folder", "Did you mean build?"),
        ("build folder --root R", "required: --out"),
        ("build folder --root R --out O --max-sid 3", "Did you mean --max-side?"),
        ("build folder --rot R --out O", "unrecognized arguments: --rot. Did you mean --root?"),
        ("build folder --root a b c d e f --out O", "unrecognized arguments: b c d and 2 more. See"),
        ("build folder --root a b --out O --workrs 1", "unrecognized arguments: --workrs b 1. Did you mean --workers?"),
        ("build folder --root R --out O --samples-per-shard 0", "not a whole number above 0"),
        ("build folder --root R --out O --max-skipped 2", "not a number from 0 to 1"),
        ("build folder --root R --out O", "must be a folder of class folders"),
        ("build folder --root R --out http://127.0.0.1/O", "cannot be written"),
        ("build folder --root R --out pipe:cat", "would run a shell command"),
        ("build folder --root R --out O --quality 80", "--max-side too"),
        ("build folder --root R --out O --max-side 9 --quality 101", "1 to 100"),
        ("build folder --root R --out O --verify all", "invalid choice"),
        ("build folder --root s3://bucket/R --out O", "is a URL"),
        ("build mnist --root R --out O --split val", "it has train and test"),
        ("build mnist --root R --out O --dataset fashion", "Did you mean fashion_mnist?"),
        ("build coco --root R --out O", "annotations/instances_<split>.json"),
        ("build mosaic --root R --known a --mode train --count 3 --out O", "R does not exist"),
        ("build mosaic --root R --known a --mode train --count 3 --split x --out O", "unrecognized arguments: --split"),
        ("check R", "R does not exist"),
        ("show R", "R does not exist"),
        ("index R", "is not a folder"),
        ("index http://127.0.0.1/R", "cannot be written"),
        ("index http://127.0.0.1/R --out O", "name them with --shards"),
        ("index pipe:cat", "would run a shell command"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, line, sentence):
    """A mistake on the command line is answered in one sentence, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    assert sentence in mistake(capsys, *line.split())
    assert list(tmp_path.iterdir()) == []


def test_coco_splits(tmp_path, capsys):
    """Where the default split is missing, the one that COCO's folder has is named."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    assert "--split may be val2017" in mistake(capsys, "build", "coco", "--root", str(tmp_path), "--out", "O")
    line = ["build", "coco", "--root", str(tmp_path), "--out", "O", "--split", "val2017"]
    assert "is no list of COCO" in mistake(capsys, *line)


def test_build_show_check(animals, tmp_path, capsys):
    """The commands `build`, `show` and `check` work from the command line."""
    out = str(tmp_path / "out")
    assert main(["build", "folder", "--root", str(animals), "--out", out, "--samples-per-shard", "8"]) == 0
    assert "21 samples in 3 shards" in capsys.readouterr().out
    assert main(["show", out]) == 0
    table = capsys.readouterr().out
    for line in ("dataset    animals", "samples    21", "shards     3 of 5 .. 8 samples", "width      20 pixels"):
        assert line in table
    assert [line.split() for line in table.splitlines()[-3:]] == [["cat", "7"], ["dog", "7"], ["emu", "7"]]
    assert main(["check", out]) == 0
    assert capsys.readouterr().out == f"{out}: right.\n"
    (tmp_path / "out" / "000001.tar").unlink()
    assert main(["check", "--quick", out]) == 1
    assert capsys.readouterr().out == f"000001.tar: missing\n{out}: 1 fault.\n"


def test_index_from_the_command_line(animals, build_folder, tmp_path, capsys):
    build_folder(animals, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    line = ["index", str(tmp_path / "out"), "--class-names", str(tmp_path / "classes.txt")]
    capsys.readouterr()
    assert "'emu', which --class-names does not name" in mistake(capsys, *line)
    (tmp_path / "classes.txt").write_text("dog\ncat\nemu\n")
    assert main(line) == 0
    assert "21 samples in 5 shards, 3 classes" in capsys.readouterr().out


def test_light_imports():
    """The command imports neither torch nor webdataset."""
    code = "import sys, shards.shards_cli; sys.exit(bool({'torch', 'webdataset'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_broken_pipe(animals, build_folder, tmp_path):
    """A reader that closes the pipe ends the command quietly."""
    build_folder(animals, tmp_path / "set")
    show = [sys.executable, "-m", "shards", "show", str(tmp_path / "set")]
    with subprocess.Popen(show, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        done.stdout.close()
        assert done.stderr.read() == ""
    assert done.returncode == 0


def test_unwritable_out(animals, build_folder, tmp_path, capsys):
    """An --out folder that cannot be made is reported in one sentence by every command."""
    build_folder(animals, tmp_path / "set")
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    out = str(tmp_path / "file" / "out")
    sentence = f"--out {out} cannot be made or written (Not a directory): give a folder in which you may write."
    assert sentence in mistake(capsys, "build", "folder", "--root", str(animals), "--out", out)
    assert sentence in mistake(capsys, "split", str(tmp_path / "set"), "--per-class", "1", "--out", out)
    assert sentence in mistake(capsys, "index", str(tmp_path / "set"), "--out", out)


@pytest.mark.parametrize(
    ("given", "split", "dataset"),
    [
        ([], "test", "photos"),
        (["--name", "zoo"], "test", "zoo"),
        (["--split", "train"], "train", "test"),
        (["--split", "test"], "test", "test"),
    ],
)
def test_root_names_split(animals, tmp_path, given, split, dataset):
    """A root named like a split is that split, unless --split is given."""
    (tmp_path / "photos").mkdir()
    animals.rename(tmp_path / "photos" / "test")
    line = ["build", "folder", "--root", str(tmp_path / "photos" / "test"), "--out", str(tmp_path / "out"), *given]
    assert main(line) == 0
    manifest = read_manifest(str(tmp_path / "out"))
    assert (manifest.split, manifest.dataset) == (split, dataset)
    assert main(line) == 0  # finished, of the same settings


def test_resume_old_build(animals, build_folder, tmp_path, capsys):
    """A build begun before roots named splits continues with the names it had."""
    (tmp_path / "photos").mkdir()
    root = animals.rename(tmp_path / "photos" / "test")
    build_folder(root, tmp_path / "out", samples_per_shard=1000)
    (tmp_path / "out" / "manifest.json").unlink()
    assert main(["build", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    manifest = read_manifest(str(tmp_path / "out"))
    assert (manifest.split, manifest.dataset) == ("train", "test")


def test_build_summary(animals, build_folder, tmp_path, capsys, monkeypatch):
    """A build states its classes, and no rate where nothing was read."""
    monkeypatch.setattr("shards.build.Manifest", None)  # ends the build just before its manifest
    with pytest.raises(TypeError):
        build_folder(animals, tmp_path / "out")
    assert "21 samples in 5 shards, 3 classes ('cat', 'dog', 'emu'), " in capsys.readouterr().out
    monkeypatch.undo()
    build_folder(animals, tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 21 samples in 5 shards, 3 classes ('cat', 'dog', 'emu').\n"


def test_adapter_help():
    """No two adapters have the same help."""
    said = [adapter.doc or sys.modules[adapter.samples.__module__].__doc__ for adapter in ADAPTERS.values()]
    assert len(set(said)) == len(said)


def test_a_count_and_its_noun_agree():
    assert [counted(n, noun) for n, noun in ((1, "shard"), (2, "shard"), (1, "class"), (0, "class"))] == [
        "1 shard",
        "2 shards",
        "1 class",
        "0 classes",
    ]
