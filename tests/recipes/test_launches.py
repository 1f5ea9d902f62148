"""Every launch configuration trains as one process does, and a run goes on under another one."""

import json
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from bigtrain.methods.defend.network import masked_student
from bigtrain.models.architecture import Architecture
from bigtrain.runtime.ports import free_port
from tests.launching import ENVIRONMENT, ROOT, accelerate, run, start
from tests.runs import losses, scores


def launch(config, processes, *flags):
    done = run("defend.py", *flags, processes=processes, config=config)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done


@pytest.fixture(scope="module")
def flags(twenty_steps):
    """20 steps of 12 pictures a stage, 5 an epoch, without drop path."""
    return twenty_steps["defend"]


@pytest.fixture(scope="module")
def alone(run_of_twenty_steps):
    made = run_of_twenty_steps("defend", 1)
    assert len(losses(made, "tune")) == len(losses(made, "distil")) == 20
    return made


@pytest.mark.parametrize("config", ["ddp", "zero1", "zero2", "zero3"])
def test_two_processes(flags, alone, tmp_path, config):
    """Two processes have the losses of one over twenty steps, under DDP and each stage of ZeRO."""
    done = launch(config, 2, *flags, "--out", tmp_path / "run")
    assert "2 process(es)" in done.stdout
    for stage in ("tune", "distil"):
        assert losses(tmp_path / "run", stage) == pytest.approx(losses(alone, stage), abs=1e-5)


def test_by_accelerate(flags, alone, run_of_twenty_steps, tmp_path):
    """The command of the README starts two processes with the losses of one, and the bits of those of a scheduler."""
    done = subprocess.run(
        accelerate("cpu2", 2, *flags, "--out", tmp_path / "run"),
        capture_output=True, text=True, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "2 process(es)" in done.stdout, done.stderr
    for stage in ("tune", "distil"):
        assert losses(tmp_path / "run", stage) == pytest.approx(losses(alone, stage), abs=1e-5)
        assert losses(tmp_path / "run", stage) == losses(run_of_twenty_steps("defend", 2), stage)


def test_two_machines_find_each_other(flags, alone, tmp_path):
    """The launch file for several machines, made one for CPUs; as it is, it is refused where there is no GPU."""
    port, machines = free_port(), []
    (tmp_path / "cpu.yaml").write_text(
        (ROOT / "recipes" / "accelerate" / "multinode.yaml").read_text() + "use_cpu: true\n"
    )
    for machine in range(2):
        command = accelerate("multinode", 2, *flags, "--distil-epochs", 1, "--out", tmp_path / "run")
        command = [str(tmp_path / "cpu.yaml") if word.endswith("multinode.yaml") else word for word in command]
        command[3:3] = ["--machine_rank", str(machine), "--main_process_port", str(port)]
        machines.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert "2 process(es)" in said[0] and losses(tmp_path / "run", "tune") == pytest.approx(
        losses(alone, "tune"), abs=1e-5
    )


def test_one_yaml_without_gpu(flags, alone, tmp_path):
    """The launch file for one GPU also runs without one."""
    line = accelerate("one", 1, *flags, "--distil-epochs", 1, "--out", tmp_path / "run")
    subprocess.run(line, env=ENVIRONMENT, check=True, timeout=300)
    assert losses(tmp_path / "run", "tune") == losses(alone, "tune")


@pytest.mark.slow
def test_compile(flags, alone, tmp_path):
    """A compiled network has the same losses."""
    launch("cpu2", 2, *flags, "--compile", "on", "--out", tmp_path / "run")
    for stage in ("tune", "distil"):
        assert losses(tmp_path / "run", stage) == pytest.approx(losses(alone, stage), abs=1e-5)


def test_accumulate_recompute(flags, alone, tmp_path):
    """Gradient accumulation and recomputation change no loss."""
    launch("cpu2", 2, *flags, "--accumulate", "3", "--recompute", "--out", tmp_path / "run")
    for stage in ("tune", "distil"):
        assert losses(tmp_path / "run", stage) == pytest.approx(losses(alone, stage), abs=1e-5)


def test_hidden_patches(small, tmp_path):
    """A student of hidden patches, mask token included, learns and scores alike on one process, DDP and ZeRO-3."""
    hidden = "--no-tune --drop-path 0 --predict hidden --score-pairs 2 --distil-lr 1e-4"
    flags = [*small, *hidden.split()]
    for config, processes in (("cpu", 1), ("ddp", 2), ("zero3", 2)):
        launch(config, processes, *flags, "--out", tmp_path / config)
        assert losses(tmp_path / config, "distil") == pytest.approx(losses(tmp_path / "cpu", "distil"), abs=1e-5)
        one, other = (scores(tmp_path / name) for name in ("cpu", config))
        assert one["key"].tolist() == other["key"].tolist()
        assert (one["score"] - other["score"]).abs().max() < 1e-4  # of weights that differ by rounding
    own_D, shared_D = (load_file(tmp_path / n / "student.safetensors")["mask_token"] for n in ("cpu", "zero3"))
    torch.manual_seed(0)
    begun = masked_student(Architecture("vit_tiny_patch16_224", 32, 8, 2), decoder_blocks=1)
    assert 1e-4 < (own_D - begun.mask_token_D).abs().mean() < 1e-2  # eight steps of at most 1e-4
    assert torch.allclose(own_D, shared_D, atol=1e-4)


def test_ema_queue_zero(small, tmp_path):
    """Moving averages and the queue are the same under ZeRO."""
    averaged = "--drop-path 0 --tune-epochs 2 --tune-lr 1e-3 --ema-teacher --ema-student 0.9 --queue 64"
    flags = [*small, *averaged.split()]
    for config, processes in (("cpu", 1), ("zero2", 2)):
        launch(config, processes, *flags, "--out", tmp_path / config)
    for stage in ("tune", "distil"):
        found = [losses(tmp_path / config, stage) for config in ("cpu", "zero2")]
        assert found[0] == pytest.approx(found[1], abs=1e-5)
    alone, shared = (load_file(tmp_path / config / "student.safetensors") for config in ("cpu", "zero2"))
    off = torch.cat([(alone[name] - shared[name]).abs().flatten() for name in alone])
    # where a gradient is nearly 0, AdamW's step is the sign of rounding: single weights differ by up to a step
    assert off.max() < 1e-3 and off.mean() < 1e-6


def stopped_in_epoch(out, stage, config, processes, flags):
    """Start, and ask to stop in the middle of an epoch of a stage."""
    began = len(losses(out, stage))
    started = start("defend.py", *flags, "--out", out, processes=processes, config=config)
    while started.poll() is None and len(losses(out, stage)) <= began:
        time.sleep(0.002)
    (out / "stop").touch()
    done = started.result()
    stopped = json.loads((out / "stopped.json").read_text())
    assert done.returncode == 85 == stopped["exit_code"] and stopped["stage"] == stage, done.stderr[-2000:]
    return stopped["step"]


def test_resume_elsewhere(flags, alone, tmp_path):
    """A run goes on in mid-epoch with another number of processes, and under ZeRO."""
    out = tmp_path / "run"
    steps = [stopped_in_epoch(out, "tune", "cpu2", 2, [*flags, "--workers", "1"])]
    steps += [stopped_in_epoch(out, "tune", "cpu", 1, flags), stopped_in_epoch(out, "distil", "zero2", 3, flags)]
    assert 0 < steps[0] < steps[1] < 20 and 0 < steps[2] < 20
    done = launch("zero3", 2, *flags, "--out", out)
    assert "continuing from" in done.stdout and not (out / "stopped.json").exists()
    for stage in ("tune", "distil"):
        assert losses(out, stage) == pytest.approx(losses(alone, stage), abs=1e-5)


WRONG = {
    "a batch that does not divide": ("cpu2", 2, ["--tune-batch", "9"], {}, "does not divide among 2 processes"),
    "two processes of which one starts": ("cpu", 2, [], {}, "asked for 2 processes and started one"),
    "strangers": ("cpu", 1, [], {"OMPI_COMM_WORLD_SIZE": "2"}, "2 processes were started (OMPI_COMM_WORLD_SIZE)"),
    "accumulation that does not divide": ("cpu", 1, ["--accumulate", "5"], {}, "--accumulate 5 does not divide"),
    "ZeRO-3 with a moving average": ("zero3", 2, ["--ema-teacher"], {}, "launch with recipes/accelerate/zero2.yaml"),
    "DeepSpeed silently off": ("zero2", 2, [], {"ACCELERATE_USE_CPU": "true"}, "silently turn DeepSpeed off"),
    "fp16 without a GPU": ("cpu", 1, ["--precision", "fp16"], {}, "--precision fp16 needs a GPU"),
    "no run to resume from": ("cpu", 1, ["--resume-from", "recipes"], {}, "--resume-from recipes is not a run"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_launch(flags, tmp_path, wrong):
    """A wrong launch ends at once with one sentence on what is wrong, and leaves nothing."""
    config, processes, more, variables, says = WRONG[wrong]
    more, environment = [*flags, *more, "--out", tmp_path / "run"], {**ENVIRONMENT, **variables}
    if config == "cpu" and processes == 2:  # the fault lies in what accelerate starts
        line = accelerate(config, processes, *more)
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)
    else:
        done = run("defend.py", *more, processes=processes, config=config, environment=environment, folder=ROOT)
        assert done.returncode == 2
    errors = [row for row in done.stderr.splitlines() if row.startswith("defend.py: error:")]
    assert done.returncode != 0 and len(errors) == 1 and says in errors[0], done.stderr[-3000:]
    assert not (tmp_path / "run").exists()


def test_two_starts(flags, tmp_path):
    """A second start of one run waits for the first to end, so that neither writes over the other."""
    out = tmp_path / "run"
    first = start("defend.py", *flags, "--out", out)
    while not (out / "log.jsonl").exists():
        time.sleep(0.01)
    assert first.poll() is None
    done = launch("cpu", 1, *flags, "--out", out)
    assert "waiting for an earlier start of this run to end" in done.stdout and first.result().returncode == 0
