"""What sbatch's refusals mean, in the terms of the submitted script."""

from __future__ import annotations

from collections.abc import Callable

CAUSES = {  # a word of sbatch's refusal -> the parameters behind it
    "partition": ("partition", "account"),
    "account": ("account", "partition"),
    "qos": ("qos",),
    "time limit": ("time",),
    "node count": ("nodes",),
    "more processors": ("nodes", "ntasks-per-node", "cpus-per-task"),
    "memory": ("mem",),
    "feature": ("constraint",),
    "gres": ("gpus-per-node",),
    "gpu": ("gpus-per-node",),
    "dependency": ("dependency",),
    "node name": ("exclude",),
    "node configuration": ("gpus-per-node", "cpus-per-task", "ntasks-per-node", "mem", "nodes", "constraint"),
    "array": ("array",),
}
OF_NODES = {"partition", "nodes", "gpus-per-node", "mem"}


def explained(refusal: str, script: str, what_there_is: Callable[[], str]) -> str:
    """sbatch's refusal in one sentence, with the script lines that caused it and what is available instead."""
    words = [line.split("error:", 1)[1].strip() for line in refusal.splitlines() if "sbatch: error:" in line]
    words.sort(key=lambda line: "Batch job submission failed" in line)
    what = words[0].rstrip(".") if words else (refusal.strip().splitlines() or ["no reason given"])[-1]
    everything = " ".join(words).lower()
    names = [name for word, names in CAUSES.items() if word in everything for name in names]
    lines = [line for line in script.splitlines() for n in dict.fromkeys(names) if line.startswith(f"#SBATCH --{n}=")]
    cause = f" The line{'s' if len(lines) > 1 else ''} behind it: {'; '.join(lines)}." if lines else ""
    there = what_there_is() if OF_NODES & set(names) else ""
    return f"sbatch refuses the job: {what}.{cause}{there} Change the cluster file or give another flag."
