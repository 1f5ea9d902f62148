"""DEFEND from end to end, on a few pictures."""

import json
import shutil
import threading
import time
from dataclasses import asdict

import pytest
import torch

import bigtrain
from bigtrain.data.protocol import Protocol, split
from bigtrain.data.shard_set import ShardSet
from bigtrain.models.architecture import Architecture
from bigtrain.models.read_weights import read_tensors
from bigtrain.models.weights import save_tensors
from recipes.defend import main
from tests.broken_pictures import with_broken_picture
from tests.fixtures import shards_made
from tests.launching import run, start
from tests.runs import ask_to_stop, judged_images, results, rows, scores


def test_end_to_end(finished):
    """A run leaves its figures, scores, report and configuration."""
    said = (finished.parent / "said").read_text()
    figures = results(finished)
    assert 0 <= figures["auroc"]["low"] <= figures["auroc"]["value"] <= figures["auroc"]["high"] <= 1
    assert set(figures["comparisons"]) == {
        "nearest neighbour on pixels",
        "nearest neighbour on features of the given teacher",
        "nearest neighbour on features of the tuned teacher",
        "a student that ignores the picture",
        "a student that ignores the picture (given teacher)",
    }
    assert figures["explained"]["low"] <= figures["explained"]["value"] <= figures["explained"]["high"] < 1
    assert figures["counts"]["known"] + figures["counts"]["novel"] == 120
    assert "AUROC" in said.splitlines()[-1] and str(finished / "report.html") in said.splitlines()[-1]
    assert "<svg" in (finished / "report.html").read_text()
    table = scores(finished)
    assert sorted(table["split"].unique()) == ["held_out", "test"]
    judged = table[table["split"] == "test"]
    assert len(judged) == 120 and (judged["novel"] == judged["classes"].map(lambda c: "ankle_boot" not in c)).all()
    assert json.loads((finished / "config.json").read_text())["packages"]["torch"]


def test_same_command_again(finished, small):
    """The same command again says that the run is finished, and does nothing."""
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    done = run("defend.py", *small, "--out", finished)
    assert done.returncode == 0 and "finished" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_saved_detector(finished):
    """The saved detector gives the scores of the run bit for bit, and maps of which they are the means."""
    judged, images = judged_images(finished)
    detector = bigtrain.load_detector(finished / "detector", device="cpu")
    assert detector.score(images).tolist() == judged["score"].tolist()
    maps = detector.score_map(images[:5])
    assert maps.shape == (5, 4, 4)
    assert maps.mean(axis=(1, 2)) == pytest.approx(judged["score"].to_numpy()[:5])


@pytest.mark.parametrize("step", [("tune", 2), ("distil", 3)])
def test_kill_and_resume(finished, small, tmp_path, step):
    """A run killed in either stage and started again ends with the same bits."""
    killed, (stage, count) = tmp_path / "killed", step
    process = start("defend.py", *small, "--out", killed)
    while process.poll() is None and sum(row["stage"] == stage for row in rows(killed)) < count:
        time.sleep(0.005)
    process.kill()
    process.result()
    assert not (killed / "results.json").exists(), "the run ended before it could be killed"
    done = run("defend.py", *small, "--out", killed)
    assert done.returncode == 0, done.stderr
    for name in ("teacher.safetensors", "student.safetensors", "scores.parquet"):
        assert (killed / name).read_bytes() == (finished / name).read_bytes(), name
    assert results(killed) == results(finished)
    assert not list(killed.rglob("*.tmp")) and not (killed / "checkpoints").exists()


def test_stop_and_resume(finished, small, tmp_path):
    """A run stops when asked, and goes on to the same bits."""
    folder = tmp_path / "again"
    with pytest.raises(SystemExit) as stop:
        ask_to_stop_after_first_step(small, folder)
    assert stop.value.code == 85
    assert run("defend.py", *small, "--out", folder).returncode == 0
    assert (folder / "student.safetensors").read_bytes() == (finished / "student.safetensors").read_bytes()


def ask_to_stop_after_first_step(small, folder):
    threading.Thread(target=ask_to_stop, args=(folder, 1), daemon=True).start()
    main([*small, "--out", str(folder)])


def test_two_processes_score(finished, small, tmp_path):
    """Two processes give the scores of one."""
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    for name in ("results.json", "report.html", "scores.parquet"):
        (again / name).unlink()
    done = run("defend.py", *small, "--out", again, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = scores(finished), scores(again)
    assert one["key"].tolist() == two["key"].tolist()
    assert (one["score"] - two["score"]).abs().max() < 1e-5
    assert results(again)["explained"] == pytest.approx(results(finished)["explained"], abs=1e-5)


@pytest.mark.parametrize(
    "variant",
    [
        "--keep random",
        "--keep unattended --mask-ratio 0.25",
        "--mask-ratio 0",
        "--predict hidden --keep random --score-pairs 2",
        "--predict all --decoder-blocks 2 --distilled-blocks 1 --score-over attended",
        "--score-over quantile --score-quantile 0.1",
        "--normalisation layer --distilled-blocks 1",
        "--normalisation none --distance smooth_l1",
        "--no-normalise-student --distance smooth_l1",
        "--global-crops 1 --ema-teacher",
        "--crop-from view --global-crops 1 --tune-epochs 2",
        "--queue 64 --prototypes 5",
        "--no-tune --schedule cosine --warmup-epochs 1",
        "--precision bf16",
        "--workers 2",
        "--validation-share 0",
    ],
)
def test_variants(small, tmp_path, variant):
    """Each variant of the method runs and is judged."""
    main([*small, "--out", str(tmp_path / "run"), "--distil-epochs", "1", *variant.split()])
    assert 0 <= results(tmp_path / "run")["auroc"]["value"] <= 1


def test_workers_change_no_bit(finished, small, tmp_path):
    main([*small, "--out", str(tmp_path / "run"), "--workers", "2"])
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (finished / "student.safetensors").read_bytes()


def test_reused_teacher(finished, small, tmp_path):
    """The tuned teacher of one run serves another, which ends with the same student."""
    tuned = ["--no-tune", "--teacher", str(finished / "teacher.safetensors")]
    main([*small, "--out", str(tmp_path / "run"), *tuned])
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (finished / "student.safetensors").read_bytes()


def test_tuned_blocks(finished, teacher):
    """Tuning changes the teacher's last two blocks and nothing else."""
    before, after = read_tensors(teacher)[0], read_tensors(finished / "teacher.safetensors")[0]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith(("trunk.blocks.0.", "trunk.blocks.1.")) for key in changed)


FAMILIES = {  # teacher, its flags, whose attention guides the mask
    "vit_small_patch16_dinov3": (
        ["--student", "vit_tiny_patch16_224", "--predict", "all", "--keep", "attended"],
        "[CLS]",
    ),
    "vit_base_patch16_siglip_224": (["--student", "vit_tiny_patch16_224"], "the pooling query"),
    "vit_relpos_small_patch16_224": (["--crop-size", "48"], "the mean token"),
    "beitv2_base_patch16_224": (["--crop-size", "48", "--student", "vit_tiny_patch16_224"], "[CLS]"),
}


@pytest.mark.parametrize("teacher_name", FAMILIES)
def test_other_families(small, tmp_path, teacher_name, capsys):
    """ViTs of other families are tuned and distilled, into narrower students too, and the detector keeps its scores."""
    further, guide = FAMILIES[teacher_name]
    main([
        *small, "--teacher", teacher_name, "--no-pretrained", "--image-size", "48", "--crop-size", "16",
        "--train-limit", "12", "--test-limit", "40", "--distil-epochs", "1", *further, "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert f"masks guided by the attention of {guide}" in capsys.readouterr().out
    judged, pictures = judged_images(tmp_path / "run")
    again = bigtrain.load_detector(tmp_path / "run" / "detector", device="cpu").score(pictures)
    assert again == pytest.approx(judged["score"].to_numpy(), rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_broken_known_picture(small, shards, tmp_path, processes):
    """A broken picture to train on is passed over in training and in each plain figure, and named once."""
    train, test = (ShardSet(str(shards / name)) for name in ("train", "test"))
    known = Protocol.of(train.classes, known=["ankle_boot"])
    sample = int(split(known, train, test, validation_share=0.1, seed=0, train_limit=24).fitted_N[0])
    with_broken_picture(shards / "train", tmp_path / "train", sample)
    flags = [*small, "--train", tmp_path / "train", "--no-tune", "--out", tmp_path / "run"]
    done = run("defend.py", *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    assert list(results(tmp_path / "run")["skipped"]["train"]) == [train.key(sample)]


def test_broken_picture(small, shards, tmp_path):
    """A broken picture is skipped, counted and named."""
    test = with_broken_picture(shards / "test", tmp_path / "test", 7)
    flags = [*small, "--test", str(tmp_path / "test"), "--test-limit", "0", "--out", str(tmp_path / "run")]
    main(flags)
    figures = results(tmp_path / "run")
    assert figures["skipped"]["train"] == {} and list(figures["skipped"]["test"]) == [test.key(7)]
    assert figures["counts"]["known"] + figures["counts"]["novel"] == len(test) - 1


MISTAKES = {
    "unknown class": (["--known", "ankle_boots"], "ankle_boot"),
    "neither side": (["--train-limit", "8", "--known"], "--known"),
    "no manifest": (["--train", "nowhere"], "bigtrain-shards build"),
    "no ViT": (["--teacher", "resnet18"], "vit_"),
    "patch size": (["--crop-size", "20"], "patch size 8 does not divide"),
    "weights of another network": (["--teacher", "WRONG"], "does not fit the network"),
    "an empty batch": (["--tune-batch", "0"], "--tune-batch is 0"),
    "no such file": (["--teacher", "missing.safetensors"], "does not exist"),
    "too many tuned blocks": (["--tuned-blocks", "9"], "the teacher has 2 blocks"),
    "too many distilled blocks": (
        ["--distilled-blocks", "3"],
        "--distilled-blocks is 3, and the teacher has 2 blocks: use 1 to 2.",
    ),
    "other patches": (["--student", "vit_small_patch14_dinov2"], "patch size is 8"),
    "everything masked": (["--mask-ratio", "1"], "--mask-ratio is 1.0; it must be from 0 to 0.99"),
    "no epoch": (["--distil-epochs", "0"], "--distil-epochs is 0; it must be at least 1"),
    "no step": (["--log-every", "0"], "--log-every is 0"),
    "one prototype": (["--prototypes", "1"], "use 2 or more"),
    "a scale that falls": (["--crop-scale", "0.5", "0.1"], "must not be above the second"),
    "no kernels for it": (["--attention", "xformers"], "it needs CUDA"),
    "a rate beyond fp32": (["--distil-lr", "1e38"], "--distil-lr is 1e+38; it must be from 0 to 1e+30"),
    "steps and epochs": (["--distil-steps", "9"], "were both given: give only one"),
    "nothing to predict": (["--predict", "hidden", "--mask-ratio", "0"], "leaves nothing to predict"),
    "no hidden patch": (["--predict", "hidden", "--mask-ratio", "0.01"], "hides none of the 16 patches"),
    "no pair": (["--predict", "hidden", "--score-pairs", "0"], "--score-pairs is 0; it must be at least 1"),
    "too deep a decoder": (
        ["--predict", "hidden", "--decoder-blocks", "3"],
        "--decoder-blocks is 3, and the student has 2 blocks: use 1 to 2",
    ),
    "too shallow a decoder": (
        ["--predict", "all", "--distilled-blocks", "3"],
        "--decoder-blocks is 1, and the tokens of the last 3 blocks are to be predicted",
    ),
    "no quantile": (["--score-quantile", "1"], "--score-quantile is 1.0; it must be from 0.001 to 0.999"),
    "a negative seed": (["--seed", "-1"], "--seed is -1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(small, tmp_path, capsys, mistake):
    """A mistake gives a one-sentence error and leaves no files."""
    flags, says = MISTAKES[mistake]
    if "WRONG" in flags:
        about = {"architecture": asdict(Architecture("vit_tiny_patch16_224")), "mean": [0], "std": [1]}
        save_tensors(tmp_path / "wrong.safetensors", {"cls_token": torch.zeros(1, 1, 192)}, about)
        flags = ["--teacher", str(tmp_path / "wrong.safetensors")]
    with pytest.raises(SystemExit) as stop:
        main([*small, "--out", str(tmp_path / "run"), *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_no_novel_images(small, shards, tmp_path, capsys):
    """A test split without novel images is refused."""
    only_known = tmp_path / "pictures" / "ankle_boot"
    only_known.mkdir(parents=True)
    test = ShardSet(str(shards / "test"))
    for sample in [s for s in range(200) if test.classes_of(s) == ["ankle_boot"]][:3]:
        (only_known / f"{sample}.png").write_bytes(test.read([sample])[0])
    shards_made("build", "folder", "--root", only_known.parent, "--out", tmp_path / "known")
    with pytest.raises(SystemExit) as stop:
        main([*small, "--test", str(tmp_path / "known"), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "no novel images" in capsys.readouterr().err


def test_other_settings(finished, small, capsys):
    """A folder whose run has other settings is refused, and they are named."""
    with pytest.raises(SystemExit) as stop:
        main([*small, "--out", str(finished), "--mask-ratio", "0.25"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "mask_ratio (0.5 there, 0.25 here)" in said


def test_finished_without_data(finished, small, shards, teacher, tmp_path, capsys):
    """A finished run needs neither shards nor teacher to say that it is finished."""
    config = json.loads((finished / "config.json").read_text())
    config["settings"] |= {"train": "gone", "test": "gone", "teacher": "gone.safetensors"}
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "config.json").write_text(json.dumps(config))
    (moved / "results.json").write_text("{}")
    main([*small, "--out", str(moved), "--train", "gone", "--test", "gone", "--teacher", "gone.safetensors"])
    assert "finished" in capsys.readouterr().out


def test_only_known_in_train(small, shards, tmp_path):
    """Training shards of known pictures alone are enough."""
    train = ShardSet(str(shards / "train"))
    known = tmp_path / "pictures" / "ankle_boot"
    known.mkdir(parents=True)
    samples = [s for s in range(len(train)) if train.classes_of(s) == ["ankle_boot"]][:30]
    for sample, payload in zip(samples, train.read(samples), strict=True):
        (known / f"{sample}.png").write_bytes(payload)
    shards_made("build", "folder", "--root", known.parent, "--out", tmp_path / "shards")
    main([*small, "--train", str(tmp_path / "shards"), "--out", str(tmp_path / "run")])
    assert len(results(tmp_path / "run")["novel"]) == 9


def test_resume_queue_ema(small, tmp_path):
    """A stopped run with a queue and a moving average goes on to the same bits."""
    flags = [*small, "--queue", "64", "--ema-teacher", "--prototypes", "5"]
    assert run("defend.py", *flags, "--out", tmp_path / "whole").returncode == 0
    with pytest.raises(SystemExit) as stop:
        ask_to_stop_after_first_step(flags, tmp_path / "stopped")
    assert stop.value.code == 85
    assert run("defend.py", *flags, "--out", tmp_path / "stopped").returncode == 0
    whole, stopped = (tmp_path / name / "teacher.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


def test_print_config_preset(capsys, tmp_path, monkeypatch):
    """With `--print-config` and no shards, the preset is shown and nothing is built."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--print-config", "--seed", "3"])
    settings = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert settings["known"] == ["ankle_boot"] and settings["image_size"] == 32 and settings["seed"] == 3
    assert settings["run"]["out"] == "runs/fashion" and not list(tmp_path.iterdir())


def test_print_config(capsys):
    """With `--print-config`, the resolved settings are shown as JSON."""
    with pytest.raises(SystemExit) as stop:
        main(["--print-config", "--train", "somewhere", "--known", "dog", "cat", "--keep", "random"])
    settings = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert settings["known"] == ["dog", "cat"] and settings["keep"] == "random" and settings["tune_epochs"] == 3
