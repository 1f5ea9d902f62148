"""A recipe that trains nothing: it counts steps, saves each, stops when it is asked, and goes on where it has saved.

What it leaves is a chain of hashes, so a run that lost or repeated a step has other bits.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

STOPPED = 85
LONGEST_HOLD_S = 60.0  # a test that fails ends too
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
AROUND = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
AROUND += ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "BIGTRAIN_LAUNCHED")


def read_flags():
    made = argparse.ArgumentParser()
    made.add_argument("--steps", type=int, default=8)
    made.add_argument("--known", nargs="+", default=["dog"])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--teacher", default="", help="a file that must be there")
    made.add_argument("--leaves", default="student.safetensors")
    made.add_argument("--holds", type=int, default=0, help="so many starts wait after 3 steps until they are asked")
    made.add_argument("--ends", type=int, nargs="*", default=[], help="codes of its first starts; -9: is killed")
    made.add_argument("--ends-after", type=int, default=0, help="steps of a start that ends like this")
    made.add_argument("--ends-rank", type=int, default=0)
    made.add_argument("--error", default="ValueError: it does not add up", help="its last words at such an end")
    made.add_argument("--deaf", action="store_true", help="signals do nothing")
    made.add_argument("--out", default="")
    made.add_argument("--config")
    made.add_argument("--print-config", action="store_true")
    if config := made.parse_known_args()[0].config:
        import tomllib

        made.set_defaults(**tomllib.loads(Path(config).read_text()))
    given = made.parse_args()
    if given.steps < 1:
        made.error(f"--steps is {given.steps}; it must be at least 1.")
    return given


def main():
    given, rank = read_flags(), int(os.environ.get("RANK", "0"))
    settings = {name: value for name, value in vars(given).items() if name not in ("out", "config", "print_config")}
    if given.print_config:
        print(json.dumps({**settings, "run": {"out": given.out}}))
        return
    asked = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: given.deaf or asked.append(number))
    out = Path(given.out)
    if given.teacher and not Path(given.teacher).is_file():
        sys.exit(f"ValueError: {given.teacher} is missing")
    around = {name: os.environ[name] for name in AROUND if name in os.environ}
    (out / f"around-{rank}.json").write_text(json.dumps(around))
    starts = out / f"starts-{rank}"
    number = len(starts.read_text()) if starts.exists() else 0
    starts.write_text("x" * (number + 1))
    code = given.ends[number] if number < len(given.ends) and rank == given.ends_rank else None
    saved = sorted(path for path in out.glob("checkpoints/count/step-*") if path.suffix != ".tmp")
    begin, state = (
        (int(saved[-1].name[5:]), (saved[-1] / "state").read_text()) if saved else (0, f"{given.known} {given.seed}")
    )
    print(f"training {given.known} from step {begin}", flush=True)
    for step in range(begin, given.steps):
        if code is not None and step == begin + given.ends_after:
            end(code, given.error)
        held_until = time.monotonic() + LONGEST_HOLD_S
        while number < given.holds and step == begin + 3 and time.monotonic() < held_until:
            if asked or (out / "stop").exists():
                break
            time.sleep(0.002)
        if asked or (out / "stop").exists():
            (out / "stop").unlink(missing_ok=True)
            sys.exit(STOPPED)
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        if rank == 0:
            save(out / "checkpoints" / "count" / f"step-{step + 1:06d}", state)
            row = {
                "stage": "count",
                "step": step + 1,
                "steps": given.steps,
                "loss": 1 / (step + 1),
                "time": time.time(),
            }
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
    if rank == 0:
        (out / given.leaves).write_text(state)
        auroc = {"value": 0.6 + 0.1 * given.seed, "low": 0.5, "high": 0.9}
        (out / "results.json").write_text(json.dumps({"known": given.known, "seed": given.seed, "auroc": auroc}))
    print(f"trained {given.known}", flush=True)


def save(folder, state):
    part = folder.with_suffix(".tmp")
    part.mkdir(parents=True, exist_ok=True)
    (part / "state").write_text(state)
    part.rename(folder)


def end(code, error):
    if code < 0:
        os.kill(os.getpid(), -code)
        time.sleep(60)
    print(f"Traceback (most recent call last):\n{error}\nand more words", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()
