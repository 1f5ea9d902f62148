"""Starting and stopping a run: the processes of a group agree on both."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from bigtrain.models.attention import torch_dtype
from bigtrain.runtime import start as module
from bigtrain.runtime.exit_codes import INTERRUPTED, STOPPED
from bigtrain.runtime.log import StageLog
from bigtrain.runtime.precision import choose_precision
from bigtrain.runtime.start import seed_step, start
from bigtrain.runtime.stopping import SIGNALS, AskedWhileWaiting, Stop
from bigtrain.text import clock
from tests import launching
from tests.launching import ENVIRONMENT


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_seed_step():
    """A step's random numbers depend on seed, step and rank alone."""

    def drawn(*of):
        torch.rand(7)
        seed_step(*of)
        return tuple(torch.rand(2).tolist())

    steps = [(seed, step, rank) for seed in range(3) for step in range(5) for rank in range(4)]
    first = [drawn(*of) for of in steps]
    assert [drawn(*of) for of in steps] == first
    assert len(set(first)) == len(first)


@pytest.mark.parametrize(
    ("cuda", "bf16", "expected"),
    [(True, True, "bf16"), (True, False, "fp16"), (False, True, "fp32"), (False, False, "fp32")],
)
def test_auto_precision(monkeypatch, cuda, bf16, expected):
    """The precision `auto` is a rule of the device: the same on every CPU, with bf16 instructions or without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision("auto") == expected


@pytest.mark.parametrize(
    ("cuda", "precision", "says"),
    [(False, "fp16", "--precision fp16 needs a GPU"), (True, "bf16", "bf16 is not supported by Old GPU")],
)
def test_precision_refused(monkeypatch, cuda, precision, says):
    """A precision that the device lacks is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    with pytest.raises(ValueError, match=says):
        choose_precision(precision)
    assert choose_precision("fp32") == "fp32"


def test_precisions_by_name():
    assert [torch_dtype(p) for p in ("fp32", "bf16", "fp16")] == [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        (("ACCELERATE_USE_FSDP",), "asks for FSDP, which is not supported"),
        (("ACCELERATE_USE_DEEPSPEED",), "DeepSpeed and started no process group"),
        (("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"), "would silently turn DeepSpeed off"),
    ],
)
@pytest.mark.parametrize("stage", ["0", "2"])
def test_launch_refused(monkeypatch, asks, says, stage):
    """An FSDP or DeepSpeed launch that would silently run without it is refused."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    for variable in asks:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=says):
        start("fp32")


def test_deepspeed_takes_no_fp16(monkeypatch):
    for variable, value in (("ACCELERATE_USE_DEEPSPEED", "true"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="DeepSpeed with fp16 is not supported"):
        start("fp16")


def test_strangers_refused(monkeypatch):
    """Processes that have no common process group are refused."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(
        ValueError, match=r"started 2 processes, but they run as 1 that do not know each other\. Launch with"
    ):
        start("fp32")


def two_ranks(folder, script, *, use_cpu):
    (folder / "script.py").write_text(script)
    environment = {**ENVIRONMENT, **({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})}
    return launching.start(folder / "script.py", processes=2, environment=environment, folder=folder).ranks


TWO = """
from pathlib import Path
import os, signal, time
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.stopping import Stop
from bigtrain.runtime.start import start
with user_errors("recipe.py"):
    accelerator = start("fp32")
    rank = accelerator.process_index
    stop = Stop(accelerator, Path("."))
    agreed = []
    for step in range(4):
        accelerator.wait_for_everyone()
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)  # one rank alone is asked
        agreed.append(stop.agreed())
    Path(f"agreed{rank}").write_text(repr(agreed))
    stop.leave()
"""


@pytest.mark.parametrize("use_cpu", [True, False])
def test_all_agree_to_stop(tmp_path, use_cpu):
    """All processes agree to stop once one of them was asked."""
    ranks = two_ranks(tmp_path, TWO, use_cpu=use_cpu)  # if unset, bare Accelerate would not form a group
    assert [rank.wait() for rank in ranks] == [STOPPED, STOPPED], ranks[0].said("err")
    agreed = [(tmp_path / f"agreed{rank}").read_text() for rank in range(2)]
    assert agreed == ["[False, False, True, True]"] * 2
    said = "".join(rank.said("out") for rank in ranks)
    assert said.count("stopped on request, saved; the same command continues.") == 1


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_stop_signal(accelerator, handlers, tmp_path, number):
    """A signal asks for the stop and does nothing else, even when it comes twice."""
    stop = Stop(accelerator, tmp_path)
    assert not stop.agreed()
    os.kill(os.getpid(), number)
    assert stop.agreed()
    assert stop.agreed()
    os.kill(os.getpid(), number)  # again, at once, as a launcher passes on what the terminal sent to all
    time.sleep(0.1)


IN_COLLECTIVE = """
from pathlib import Path
import os, signal
from bigtrain.runtime.exit import user_errors
from bigtrain.runtime.stopping import Stop
from bigtrain.runtime.start import start
with user_errors("recipe.py"):
    accelerator = start("fp32")
    stop = Stop(accelerator, Path("."))
    Path(f"pid{accelerator.process_index}").write_text(str(os.getpid()))
    if accelerator.process_index == 0:
        accelerator.wait_for_everyone()
    else:
        signal.pause()
"""


def test_second_ctrl_c(tmp_path):
    """A second Ctrl-C ends at once a process that waits in a collective."""
    first, second = two_ranks(tmp_path, IN_COLLECTIVE, use_cpu=True)
    until = time.monotonic() + 60
    while not (tmp_path / "pid0").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)
    for _ in range(2):
        first.send_signal(signal.SIGINT)
        time.sleep(1.5)
    assert first.wait() == INTERRUPTED and "interrupted; the same command continues." in first.said("err")
    second.kill()


def test_stop_released(accelerator, handlers, tmp_path):
    """Releasing a stop restores the previous signal handlers."""
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = Stop(accelerator, tmp_path)
    stop.release()
    stop.release()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_stop_file(accelerator, handlers, tmp_path, capsys):
    """A file requests the stop, and is deleted when the run exits."""
    stop = Stop(accelerator, tmp_path)
    (tmp_path / "stop").touch()
    assert stop.agreed()
    with pytest.raises(SystemExit) as leaving:
        stop.leave()
    assert leaving.value.code == STOPPED
    assert "the same command continues" in capsys.readouterr().out
    assert not (tmp_path / "stop").exists()
    assert not stop.agreed()


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_rows(accelerator, tmp_path, capsys):
    """The log has a row every so many steps and one at the end."""
    log = StageLog(tmp_path, accelerator, "distil", steps=7, done=0, images_per_step=4, every=3)
    for step in range(1, 8):
        log.step(loss=torch.tensor(step / 2), lr=0.5)
    log.close()
    assert [(row["stage"], row["step"], row["loss"], row["lr"]) for row in rows(tmp_path)] == [
        ("distil", 3, 1.5, 0.5),
        ("distil", 6, 3.0, 0.5),
        ("distil", 7, 3.5, 0.5),
    ]
    assert all(row["images_per_s"] > 0 and row["time"] > 1e9 for row in rows(tmp_path))
    said = capsys.readouterr().out
    assert "distil  step 7/7  loss 3.5  lr 0.5" in said
    assert list((tmp_path / "tensorboard" / "distil").iterdir())


def test_log_reading(accelerator, tmp_path):
    """A log row reports the cost of reading since the previous row, and what was skipped."""
    log = StageLog(tmp_path, accelerator, "tune", steps=4, done=0, images_per_step=4, every=2)
    began = time.monotonic()
    for number in range(4):
        time.sleep(0.05)
        skipped = {"damaged": number, "too many pixels": 1}
        log.step(loss=1.0, wait_s=0.04 if number < 2 else 0.0, read_bytes=10**6, skipped=skipped)
    elapsed_s = time.monotonic() - began
    log.close()
    first, second = rows(tmp_path)
    assert 20 < first["data_wait_percent"] <= 80.01 and second["data_wait_percent"] == 0
    assert 4 / elapsed_s / 3 < first["read_mb_per_s"] <= 2 / 0.1
    assert (first["skipped_damaged"], second["skipped_damaged"], second["skipped_too_many_pixels"]) == (1, 3, 1)


def test_log_mfu(accelerator, tmp_path):
    """The share of the peak (MFU) is the steps' FLOPs over what all devices could do."""
    log = StageLog(
        tmp_path, accelerator, "tune", steps=2, done=0, images_per_step=4, every=1, flops_per_step=5e9, peak_flops=1e11
    )
    for _ in range(2):
        log.step(loss=1.0)
    log.close()
    for row in rows(tmp_path):
        steps_per_s = row["images_per_s"] / 4
        assert row["mfu_percent"] == pytest.approx(100 * steps_per_s * 5e9 / 1e11)
        assert row["images_per_s_per_process"] == row["images_per_s"] and row["memory_gib"] > 0


def test_log_events(accelerator, tmp_path):
    """Events and skipped steps are rows too, and a loss that is not finite is still valid JSON."""
    log = StageLog(tmp_path, accelerator, "tune", steps=2, done=0, images_per_step=4, every=1)
    log.step(loss=float("nan"))
    log.skipped("the loss is not finite", ["a", "b"])
    log.saved(0.5, 1)
    log.step(loss=1.0)
    log.close()
    first, skipped, saved, second = rows(tmp_path)
    assert first["loss"] == "nan" and (skipped["event"], skipped["keys"]) == ("step skipped", ["a", "b"])
    assert saved["checkpoint_s"] == 0.5 and second["skipped_steps"] == 1 and second["checkpoint_s"] == 0.5


def test_log_continued(accelerator, tmp_path):
    """A continued log goes on at its step."""
    for done in (0, 4):
        log = StageLog(tmp_path, accelerator, "tune", steps=8, done=done, images_per_step=4, every=2)
        for _ in range(4):
            log.step(loss=1.0)
        log.close()
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8]


def test_other_ranks_write_nothing(tmp_path):
    log = StageLog(
        tmp_path, SimpleNamespace(is_main_process=False), "tune", steps=2, done=0, images_per_step=4, every=1
    )
    log.step(loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_clock_by_hand():
    assert [clock(s) for s in (0, 59.6, 61, 3599, 4000)] == ["0:00", "1:00", "1:01", "59:59", "1:06:40"]


def test_asked_while_waiting(accelerator, tmp_path):
    """A process alone leaves its wait for data at once; a request between two steps is not waited out either."""
    stop = Stop(accelerator, tmp_path)
    try:
        with pytest.raises(AskedWhileWaiting), stop.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        with pytest.raises(AskedWhileWaiting), stop.waiting():
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGTERM)  # while it computes: the step ends first
        assert stop.agreed()
    finally:
        stop.release()
