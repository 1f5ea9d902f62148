"""CPU seconds that commands take to answer: help, settings, mistakes, and the server of a stream's workers.

    uv run python tests/benchmarks/starting.py [--vs CHECKOUT]

With another checkout (which has an environment of its own, .venv) each command is run in both in turn.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).parents[2]
MAKE = "import sys; from shards.shards_cli import main; sys.exit(main(sys.argv[1:]))"
COMMANDS = {
    "python -c 'import torch'": ["-c", "import torch"],
    "bigtrain --help": ["bigtrain/cli.py", "--help"],
    "bigtrain-shards --help": ["-m", "shards", "--help"],
    "bigtrain-slurm --help": ["-m", "slurm.slurm_cli", "--help"],
    "defend.py --help": ["recipes/defend.py", "--help"],
    "defend.py --print-config": ["recipes/defend.py", "--print-config"],
    "pretrain.py --help": ["recipes/pretrain.py", "--help"],
    "a setting out of range": ["recipes/defend.py", "--seed", "-1"],
    "a missing folder": ["recipes/defend.py", "--train", "no", "--test", "no", "--known", "bag", "--out", "OUT"],
    "an unknown class": ["recipes/defend.py", "--train", "SET", "--test", "SET", "--known", "cat", "--out", "OUT"],
    "a name that timm lacks": ["recipes/pretrain.py", "--train", "SET", "--out", "OUT", "--model", "resnet5000"],
    "a layer that the network lacks": [
        *("recipes/signatures.py", "--train", "SET", "--known", "bag", "--out", "OUT"),
        *("--network", "resnet18", "--no-pretrained", "--layer", "x"),
    ],
    "import recipes.defend, and what a run of it takes": ["-c", "RUN"],
    "a stream worker's server": ["-c", "import bigtrain.data.stream"],
}
RUN = """
import recipes.defend
import bigtrain.methods.defend.detector, bigtrain.methods.defend.network
import bigtrain.evaluation.judge, bigtrain.training.stage
"""


def cpu_s(line: list[str], top: Path) -> float:
    python = top / ".venv" / "bin" / "python"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(
        [str(python if python.exists() else sys.executable), *line],
        cwd=top, env={**environment, "PYTHONPATH": str(top)}, capture_output=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs", type=Path, help="another checkout")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    if given.vs and not (given.vs / ".venv" / "bin" / "python").is_file():
        parser.error(f"{given.vs} has no .venv: give a checkout in which `uv sync` has been run")
    tops = [TOP, *([given.vs.absolute()] if given.vs else [])]
    with tempfile.TemporaryDirectory() as folder:
        sample = TOP / "recipes" / "presets" / "fashion" / "sample"
        options = ["--root", str(sample), "--split", "test", "--dataset", "fashion_mnist", "--out", f"{folder}/set"]
        subprocess.run(
            [sys.executable, "-c", MAKE, "build", "mnist", *options], cwd=TOP, check=True, capture_output=True
        )
        words = {"SET": f"{folder}/set", "OUT": f"{folder}/out", "RUN": RUN}
        columns = " | ".join(["here", "there", "there / here"][: 2 * len(tops) - 1])
        print(f"| CPU seconds, median of {given.runs} (least .. most) | {columns} |")
        print("|---|" + "---|" * (2 * len(tops) - 1))
        for name, line in COMMANDS.items():
            line = [words.get(word, word) for word in line]
            for top in tops:
                cpu_s(line, top)  # writes bytecode
            rounds = [[cpu_s(line, top) for top in tops] for _ in range(given.runs)]
            found = list(zip(*rounds, strict=True))
            cells = [f"{statistics.median(times):.2f} ({min(times):.2f} .. {max(times):.2f})" for times in found]
            if len(tops) == 2:
                cells.append(f"{statistics.median(there / here for here, there in rounds):.1f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
