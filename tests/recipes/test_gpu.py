"""DEFEND on a GPU: every precision trains, stops, goes on to the same bits, and leaves the detector that was judged."""

import json
import threading

import pytest
import torch

import bigtrain
from tests.recipes.conftest import ON_GPU, launched
from tests.recipes.test_defend import judged_images
from tests.recipes.test_pretrain import ask_to_stop

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_a_gpu_is_stopped_goes_on_and_its_detector_gives_its_scores(small, tmp_path, precision):
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = [*small, "--precision", precision, "--distil-epochs", "10", "--drop-path", "0.1", "--workers", "1"]
    assert launched("defend.py", *flags, "--out", whole, environment=ON_GPU).returncode == 0
    threading.Thread(target=ask_to_stop, args=(run, 6), daemon=True).start()
    assert launched("defend.py", *flags, "--out", run, environment=ON_GPU).returncode == 85
    done = launched("defend.py", *flags, "--out", run, environment=ON_GPU)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr
    assert f"on cuda, precision {precision}" in done.stdout
    rows = [json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    assert (last["stage"], last["step"]) == ("distil", 40) and last["memory_gib"] > 0
    assert precision == "fp16" or not any(row.get("event") == "step skipped" for row in rows)
    judged, images = judged_images(run)
    detector = bigtrain.load_detector(run / "detector", device="cuda")
    assert detector.score(images).tolist() == judged["score"].tolist()
    for file in ("teacher.safetensors", "student.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
