"""Sweep files become runs; no SLURM is asked."""

import json
import re
import tomllib

import pytest

from bigtrain.data.schema import Manifest
from bigtrain.data.set_files import read_manifest
from recipes import baselines, deep_novelty, defend, panda
from slurm.sweep import plan, toml_value
from tests.launching import ROOT

SHIPPED = sorted((ROOT / "slurm" / "sweeps").glob("*.toml"))
RUNS = {
    "coco_uniclass": 240, "defend_masks": 570, "defend_table1_cifar10": 270, "defend_table1_mvtec": 405,
    "defend_table2": 390, "defend_table3": 180, "defend_table4": 420, "defend_table5": 12,
    "deep_novelty_table1": 48, "deep_novelty_table1_features": 36, "deep_novelty_table1_founder": 12,
    "deep_novelty_table2": 9, "deep_novelty_table3": 24, "deep_novelty_ablation": 15,
    "small_fashion": 60, "small_cifar10": 63, "small_growth": 12, "small_mosaics": 9, "small_vits14": 18,
    "small_coco": 3, "panda_cifar10": 30,
}  # fmt: skip
CONFIGS = {
    "recipes/defend.py": defend.Config,
    "recipes/deep_novelty.py": deep_novelty.Config,
    "recipes/baselines.py": baselines.Config,
    "recipes/panda.py": panda.Config,
}
COUNTS = {"cifar10": 10, "mnist": 10, "fashion": 10, "cifar100": 20, "voc": 20, "coco": 80}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def of(text):
        file = tmp_path / "mine.toml"
        file.write_text('recipe = "recipes/defend.py"\n' + text)
        return plan(file)

    return of


def test_axes(sweep):
    """Axes are multiplied, and zipped ones are not."""
    found = sweep(
        """
seeds = [0, 1]
[settings]
known = ["dog"]
[axes]
keep = ["attended", "random"]
[[zip]]
axis = "row"
label = ["small", "large"]
image_size = [32, 64]
crop_size = [16, 32]
"""
    )
    assert [run.name for run in found.runs] == [
        f"keep{keep}-{row}-s{seed}"
        for keep in ("attended", "random") for row in ("small", "large") for seed in (0, 1)
    ]  # fmt: skip
    assert found.runs[2].settings == {
        "known": ["dog"], "keep": "attended", "image_size": 64, "crop_size": 32, "seed": 0
    }  # fmt: skip
    assert found.runs[2].axes == {"keep": "attended", "row": "large", "seed": 0}
    assert found.out.parts[-2:] == ("runs", "mine")


@pytest.mark.parametrize(
    "protocol, side, first, count",
    [
        ("uni-class", "known", ["c0"], 10),
        ("all-vs-one", "novel", ["c0"], 10),
        ("half-vs-half", "known", ["c0", "c1", "c2", "c3", "c4"], 4),
    ],
)
def test_protocol(sweep, protocol, side, first, count):
    """A protocol becomes a run for each split."""
    classes = json.dumps([f"c{number}" for number in range(10)])
    found = sweep(f'protocol = "{protocol}"\nclasses = {classes}\n[settings]\ntrain = "x"\n')
    assert len(found.runs) == count and found.runs[0].settings == {"train": "x", side: first}


def test_shared_runs(sweep):
    """A shared run is there once for all that need it."""
    found = sweep(
        """
protocol = "uni-class"
classes = ["a", "b"]
seeds = [0, 1]
[settings]
tune = false
tune_epochs = 7
[axes]
keep = ["attended", "random"]
[[shared]]
name = "teacher"
per = ["known", "seed"]
settings = { tune = true, distil = false }
leaves = { teacher = "teacher.safetensors" }
"""
    )
    first = [run for run in found.runs if run.shared]
    assert sorted(run.name for run in first) == ["teacher-a-s0", "teacher-a-s1", "teacher-b-s0", "teacher-b-s1"]
    assert first[0].settings == {"tune": True, "tune_epochs": 7, "known": ["a"], "seed": 0, "distil": False}
    rest = [run for run in found.runs if not run.shared]
    assert len(rest) == 8
    for run in rest:
        needed = f"teacher-{run.axes['known']}-s{run.axes['seed']}"
        file = str(found.out / needed / "teacher.safetensors")
        assert run.needs == {file: needed} and run.settings["teacher"] == file


def test_safe_names(sweep):
    """Names are safe and unique."""
    names = ["a/b", "a b", "A B", "..", "-x", "ж", "$(touch gone)"]
    found = sweep(f"[axes]\nknown = {json.dumps([[name] for name in names])}\n")
    folders = [run.name for run in found.runs]
    assert len({name.lower() for name in folders}) == len(names)
    assert all(re.fullmatch(r"[\w+=][\w.+=-]*", name, re.ASCII) for name in folders)
    assert [run.settings["known"] for run in found.runs] == [[name] for name in names]


def test_ten_thousand_names(sweep):
    """Ten thousand runs have names of their own."""
    classes = json.dumps([f"class {number}" for number in range(100)])
    found = sweep(f'protocol = "uni-class"\nclasses = {classes}\nseeds = {list(range(100))}\n')
    assert len(found.runs) == len({run.name for run in found.runs}) == 10_000


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("seed = [0]", "there is no key 'seed'; near it: seeds"),
        ("seeds = [0.5]", "seeds is [0.5]; it must be a list of whole numbers."),
        ("seeds = 3", "seeds is 3; it must be a list."),
        ("seeds = [0, 0]", 'have the same settings: {"seed": 0} appears twice.'),
        ("max_parallel = 0", "max_parallel is 0; it must be at least 1."),
        ("[axes]\nkeep = []", "the axis keep is []; it must be a list of values."),
        ("[[zip]]\na = [1, 2]\nb = [1]", "must be of the same length: a has 2, b has 1."),
        ('classes = ["a"]', "classes needs a protocol"),
        ('protocol = "uni-class"', "a protocol needs classes = [...], or settings.train"),
        ('protocol = "one-class"\nclasses = ["a", "b"]', "one-class"),
        ('protocol = "uni-class"\nclasses = ["a", "b"]\n[settings]\nknown = ["a"]', "leave known and novel out"),
        ('[[shared]]\nname = "t"', "needs name"),
        ('[[shared]]\nname = "t"\nper = ["known"]\nleaves = {a = "b"}', "per names 'known', which is not an axis"),
        ("[cluster]\nnode = 2", "there is no setting 'node'; near it: "),
    ],
)
def test_wrong_sweep_file(sweep, text, sentence):
    """An invalid sweep file is reported."""
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sweep(text)


@pytest.mark.parametrize("value", ["a 'b' \"c\" \\ \n \x7f é", [1, [2.5, True]], float("inf"), 1e-5, False])
def test_settings_are_written_as_toml(value):
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_shipped_sweeps(file, tmp_path, monkeypatch):
    """Shipped sweeps have the runs that their README says, beside manifests with as many classes as the data sets have;
    every setting is one of the recipe."""
    for name, count in COUNTS.items():
        manifest = Manifest(name, "train", tuple(f"c{number}" for number in range(count)), "", ())
        (tmp_path / "data" / name / "train").mkdir(parents=True)
        (tmp_path / "data" / name / "train" / "manifest.json").write_text(manifest.to_json())
        assert len(read_manifest(str(tmp_path / "data" / name / "train")).classes) == count
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    monkeypatch.chdir(tmp_path)
    found = plan(file)
    assert len(found.runs) == RUNS[file.stem]
    for run in found.runs:
        assert set(run.settings) <= {*CONFIGS[run.recipe].__dataclass_fields__, "workers", "threads"}, run.name
    text = (ROOT / "slurm" / "sweeps" / "README.md").read_text()
    assert re.search(rf"`{file.stem}`.*\| {RUNS[file.stem]} \|", text)
