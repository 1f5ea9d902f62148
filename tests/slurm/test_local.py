"""The same jobs without SLURM, and what is shown before anything is submitted."""

import json
import os
import signal
import subprocess

from tests.slurm.conftest import BIN, ENVIRONMENT, RECIPE, events, same_bits, slurm, steps, told, until_training


def test_a_local_job_is_stopped_by_ctrl_c_and_goes_on_to_the_same_bits(small, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / 'it\'s "a" run'
    flags = ["--tasks-per-node", "2", "--", *small, "--distil-epochs", "30", "--out"]
    assert "AUROC" in slurm("submit", RECIPE, "--local", *flags, whole)
    assert told(whole) == ["submitted", "started", "finished"]
    line = [str(BIN / "bigtrain-slurm"), "submit", RECIPE, "--local", *map(str, [*flags, run])]
    restored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with subprocess.Popen(line, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, **restored) as job:
        until_training(run)
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(timeout=120) == 1
    assert told(run)[-1] == "stopped" and 0 < steps(run) < steps(whole)
    assert "stopped" in slurm("status", run)
    slurm("submit", RECIPE, "--local", *flags, run)
    assert [row["processes"] for row in events(run) if row["event"] == "started"] == [2, 2]
    assert "done" in slurm("status", run) and same_bits(run, whole)
    assert "is finished, nothing to do" in slurm("submit", RECIPE, "--local", *flags, run)


def test_a_local_sweep_with_a_shared_teacher_ends_in_a_table(small, tmp_path):
    settings = dict(zip((flag[2:].replace("-", "_") for flag in small[::2]), small[1::2], strict=True))
    del settings["known"]
    text = "\n".join(f"{n} = {json.dumps(v) if n in ('train', 'test', 'teacher') else v}" for n, v in settings.items())
    file = tmp_path / "two.toml"
    file.write_text(
        f"""
recipe = {json.dumps(RECIPE)}
out = {json.dumps(str(tmp_path / "out"))}
protocol = "uni-class"
classes = ["ankle_boot", "bag"]
[settings]
tune = false
{text}
[[shared]]
name = "teacher"
per = ["known"]
settings = {{ tune = true, distil = false }}
leaves = {{ teacher = "teacher.safetensors" }}
"""
    )
    before = slurm("sweep", file, "--dry-run")
    assert "ankle_boot          known ankle_boot  after teacher-ankle_boot" in before
    assert "4 runs in " in before and "#SBATCH --array=0-3" in before and not (tmp_path / "out").exists()
    said = slurm("sweep", file, "--local")
    assert said.count(": finished") == 4
    for known in ("ankle_boot", "bag"):
        one, tuned = tmp_path / "out" / known, tmp_path / "out" / f"teacher-{known}"
        assert json.loads((one / "config.json").read_text())["settings"]["teacher"] == str(
            tuned / "teacher.safetensors"
        )
        assert not (tuned / "student.safetensors").exists() and (one / "student.safetensors").exists()
    assert "4 runs: 4 done" in slurm("status", tmp_path / "out")
    table = subprocess.run(
        [BIN / "bigtrain", "tables", tmp_path / "out"], capture_output=True, text=True, env=ENVIRONMENT, check=True
    ).stdout
    assert "| bag" in table and "| mean" in table and "missing" not in table
    assert "0 to run" in slurm("sweep", file, "--local")


def test_wrong_flags_end_with_a_sentence_and_leave_nothing(small, tmp_path):
    out = tmp_path / "run"
    assert "there is no recipe" in slurm("submit", "nowhere.py", "--local", "--", "--out", out, fails=2)
    said = slurm("submit", RECIPE, "--local", "--", *small, "--mask-ratio", "2", "--out", out, fails=2)
    assert "defend.py: error: --mask-ratio is 2.0; it must be from 0 to 0.99." in said and "Traceback" not in said
    assert "sbatch reads '%' in names" in slurm("submit", RECIPE, "--local", "--", *small, "--out", out / "%j", fails=2)
    assert "holds neither a sweep nor a submitted run" in slurm("status", tmp_path, fails=2)
    assert not out.exists()
