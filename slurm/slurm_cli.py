"""The command bigtrain-slurm: submit, sweep, status, logs, cancel, retry."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

from bigtrain.files import write_json
from bigtrain.runtime.exit_codes import INTERRUPTED, USER_ERROR
from bigtrain.text import told
from slurm import scheduler, status
from slurm.ask_recipe import ask_recipe, check_settings, missing_inputs
from slurm.cluster import Cluster, read_cluster
from slurm.local import run_here, run_in_this_process
from slurm.prepare_run import check_folder, prepare, prepare_run
from slurm.run_record import FOLDER, RESULTS_FILE, JobSpec, record_event
from slurm.shipped import shipped
from slurm.submit import submit, submit_arrays
from slurm.sweep import Sweep, plan

SHOWN_RUNS = 40  # of a dry run, unless --all


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # logs hold what this terminal may lack
    own = argv.index("--") if "--" in argv else len(argv)  # what follows is the recipe's
    given = parser().parse_args(argv[:own], argparse.Namespace(flags=argv[own + 1 :]))
    try:
        code: int = given.command(given)
        return code
    except (ValueError, OSError) as error:
        print(f"bigtrain-slurm: error: {told(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="bigtrain-slurm", description="Recipes as SLURM jobs: see slurm/README.md.")
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser(
        "submit", help="one run as a job", usage="bigtrain-slurm submit RECIPE [options] -- FLAGS"
    )
    one.add_argument("recipe", type=Path, help="a script, or the name of one that comes with bigtrain, such as defend")
    where = one.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="the very same job on this machine, without SLURM")
    where.add_argument("--debug", action="store_true", help="in this process, for a debugger")
    where.add_argument("--dry-run", action="store_true", help="print what sbatch would get")
    add_cluster(one)
    one.set_defaults(command=submit_one)

    many = commands.add_parser("sweep", help="the runs of a sweep file as job arrays; skips those that are done")
    many.add_argument("file", type=Path, help="a TOML file, or the name of one that comes with bigtrain: defend_table3")
    where = many.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="one after another on this machine, without SLURM")
    where.add_argument("--dry-run", action="store_true", help="print the runs and what sbatch would get")
    many.add_argument("--all", action="store_true", help=f"with --dry-run: all runs, not the first {SHOWN_RUNS}")
    many.add_argument("--at-once", type=int, default=1, metavar="N", help="with --local: runs at the same time (1)")
    add_cluster(many)
    many.set_defaults(command=submit_sweep)

    for name, command, text in (
        ("status", show_status, "the status of its runs"),
        ("logs", show_logs, "the logs of its processes"),
        ("cancel", cancel, "cancel its jobs"),
        ("retry", retry, "submit again what failed, was cancelled, stopped or lost"),
    ):
        further = commands.add_parser(name, help=text)
        further.add_argument("folder", type=Path, help="of a run or of a sweep")
        further.set_defaults(command=command)
        if name == "retry":
            further.add_argument(
                "--local", action="store_true", help="on this machine; runs that were submitted so are anyway"
            )
            further.add_argument("--at-once", type=int, default=1, metavar="N", help="runs here at the same time (1)")
            add_cluster(further)
        if name == "logs":
            further.add_argument(
                "--all", action="store_true", help="of all processes, not just rank 0 or the failed one"
            )
            further.add_argument("--lines", type=int, default=40, metavar="N", help="last lines to show (40)")
            further.add_argument("--follow", "-f", action="store_true", help="follow until the run has ended")
    return made


def add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what each job gets; overrides the cluster file")
    group.add_argument(
        "--cluster", type=Path, metavar="FILE", help="a cluster file, or the name of a shipped one, such as a100x8"
    )
    for name, kind in get_type_hints(Cluster).items():
        flag = "--" + name.replace("_", "-")
        if get_origin(kind) is tuple:
            group.add_argument(flag, action="append", metavar="LINE")
        elif get_args(kind):
            group.add_argument(flag, choices=get_args(kind))
        else:
            group.add_argument(flag, type=kind, metavar={int: "N", float: "X"}.get(kind, "NAME"))


def cluster_of(given: argparse.Namespace, base: Cluster | None = None) -> Cluster:
    cluster = read_cluster(shipped(given.cluster, "cluster")) if given.cluster else base or Cluster()
    flags = {name: value for name in get_type_hints(Cluster) if (value := getattr(given, name)) is not None}
    return cluster.changed("the flags", **flags)


def submit_one(given: argparse.Namespace) -> int:
    given.recipe = shipped(given.recipe, "recipe")
    if given.debug:
        run_in_this_process(given.recipe, given.flags)
        return 0
    cluster = cluster_of(given)
    if not given.local and not given.dry_run:
        scheduler.check_slurm(cluster)
    print(f"asking {given.recipe} for its settings", file=sys.stderr, flush=True)
    settings = ask_recipe(given.recipe, given.flags)
    group = settings.pop("run")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    run = check_folder(Path(group["out"] or f"runs/{given.recipe.stem}-{digest}").absolute())
    logs = run / FOLDER
    if given.dry_run:
        print(f"run folder: {run}\n\n{scheduler.script(cluster, logs, run.name)}")
        return 0
    if (run / RESULTS_FILE).is_file():
        print(f"{run} is finished, nothing to do")
        return 0
    refuse_live(run)
    prepare(run, given.recipe, given.flags, cluster, logs)
    if given.local:
        return min(1, run_here([run], cluster, logs, show=True))
    (job,) = submit([run], cluster, logs, run.name)
    print(f"job {job}: {cluster.nodes} node(s), {cluster.processes} process(es); run folder: {run}")
    print(f"  bigtrain-slurm status {shlex.quote(str(run))}")
    return 0


def refuse_live(run: Path) -> None:
    (one,) = status.statuses([run])
    if one.is_live:
        raise ValueError(
            f"{run} is {one.state} as job {one.job}: wait, or `bigtrain-slurm cancel {shlex.quote(str(run))}` first."
        )


def submit_sweep(given: argparse.Namespace) -> int:
    sweep = plan(shipped(given.file, "sweep"))
    cluster = cluster_of(given, sweep.cluster)
    check_folder(sweep.out)
    if not given.local and not given.dry_run:
        scheduler.check_slurm(cluster)
    if lacking := missing_inputs(sweep):
        if given.local:
            raise ValueError(lacking[0])
        for sentence in lacking:  # a node may have what this machine lacks
            print(f"bigtrain-slurm: {sentence} Every node needs it.", file=sys.stderr)
    check_settings(sweep)
    if given.dry_run:
        show_plan(sweep, cluster, SHOWN_RUNS if not given.all else len(sweep.runs))
        return 0
    before = {one.run.name: one for one in status.statuses([sweep.out / run.name for run in sweep.runs])}
    missing = [run for run in sweep.runs if before[run.name].state != "done" and not before[run.name].is_live]
    for run in missing:
        prepare_run(run, sweep.out, cluster)
    sweep.out.mkdir(parents=True, exist_ok=True)
    write_json(sweep.out / status.SWEEP_FILE, sweep.record())
    print(f"{status.count_of(list(before.values()))}; {len(missing)} to run, in {sweep.out}")
    first = {run.name for run in sweep.runs if run.shared}
    wait_for = [one.job for one in before.values() if one.is_live and one.run.name in first]
    logs, unfinished = sweep.out / FOLDER, 0
    for is_shared in (True, False):
        runs = [sweep.out / run.name for run in missing if run.shared == is_shared]
        if given.local:
            unfinished += run_here(runs, cluster, logs, at_once=given.at_once)
        else:
            after = [] if is_shared else wait_for
            wait_for += submit_arrays(runs, cluster, logs, sweep.path.stem, sweep.max_parallel, after)
    if given.local:
        return min(1, unfinished)
    out = shlex.quote(str(sweep.out))
    print(f"  bigtrain-slurm status {out}\n  bigtrain tables {out}")
    return 0


def show_plan(sweep: Sweep, cluster: Cluster, shown: int) -> None:
    wide = max(len(run.name) for run in sweep.runs)
    for run in sweep.runs[:shown]:
        text = ", ".join(f"{name} {value}" for name, value in run.axes.items())
        waits = f"  after {', '.join(dict.fromkeys(run.needs.values()))}" if run.needs else ""
        print(f"{run.name.ljust(wide)}  {'shared  ' if run.shared else ''}{text}{waits}")
    if len(sweep.runs) > shown:
        print(f"… and {len(sweep.runs) - shown} more (--all)")
    print(f"{len(sweep.runs)} runs in {sweep.out}, at most {sweep.max_parallel} at once\n")
    print(
        scheduler.script(
            cluster, sweep.out / FOLDER, sweep.path.stem, runs=len(sweep.runs), parallel=sweep.max_parallel
        )
    )


def show_status(given: argparse.Namespace) -> int:
    found = status.statuses(status.runs_in(given.folder))
    print("\n".join(status.table(found, given.folder)))
    return 0


def show_logs(given: argparse.Namespace) -> int:
    found = status.statuses(status.runs_in(given.folder))
    if len(found) > 1 and given.follow:
        raise ValueError(f"{given.folder} holds {len(found)} runs: name one of them, {found[0].run} say, to follow it.")
    for one in found:
        files = status.log_files(one.run, one.job) if one.job else []
        if not files:
            print(f"{one.run}: no log yet ({one.state}{': ' + one.detail if one.detail else ''})")
            continue
        if not given.all:
            files = files[:1]
        if given.follow:
            status.follow(files, [one.run])
            continue
        for file in files:
            if len(found) > 1 or given.all:
                print(f"== {file}")
            print(status.clean_log("\n".join(status.tail(file, given.lines))))
    return 0


def cancel(given: argparse.Namespace) -> int:
    live = [one for one in status.statuses(status.runs_in(given.folder)) if one.is_live]
    for one in live:
        if one.job.startswith("local-"):
            (one.run / "stop").touch()
        else:
            record_event(one.run, "cancelled", job=one.job, why="by bigtrain-slurm cancel")
    scheduler.cancel([one.job for one in live if not one.job.startswith("local-")])
    print(f"{len(live)} of {len(live)} live jobs cancelled" if live else "nothing is running or waiting")
    return 0


def retry(given: argparse.Namespace) -> int:
    """Submit again what did not end well, as it was submitted."""
    found = status.statuses(status.runs_in(given.folder))
    again = [one.run for one in found if one.state in ("failed", "cancelled", "stopped", "lost")]
    if not again:
        print(f"{status.count_of(found)}; nothing to submit again")
        return 0
    record = status.sweep_record(given.folder)
    first = {row["name"] for row in record["runs"] if row["shared"]}
    here = [one.run for one in found if one.run in again and (given.local or one.job.startswith("local-"))]
    groups: dict[tuple[bool, Cluster, str], list[tuple[Path, JobSpec]]] = {}
    unfinished = retry_here(here, given, first)
    for run in (run for run in again if run not in here):
        job = JobSpec.read(run)
        job = replace(job, cluster=cluster_of(given, job.cluster))
        groups.setdefault((run.name not in first, job.cluster, job.logs), []).append((run, job))
    for _, cluster, _ in groups:
        scheduler.check_slurm(cluster)
    wait_for = [one.job for one in found if one.is_live and one.run.name in first]
    for (waits, cluster, logs), some in sorted(groups.items(), key=lambda group: group[0][0]):
        for run, job in some:
            job.write(run)
        runs = [run for run, _ in some]
        after = wait_for if waits else []
        submitted = submit_arrays(runs, cluster, Path(logs), given.folder.name, record["max_parallel"], after)
        wait_for += submitted if not waits else []
    return min(1, unfinished)


def retry_here(runs: Sequence[Path], given: argparse.Namespace, first: set[str]) -> int:
    """Run again on this machine, what others need first; how many have not finished."""
    unfinished = 0
    for is_first in (True, False):
        some = [run for run in runs if (run.name in first) == is_first]
        for cluster, logs in dict.fromkeys((JobSpec.read(run).cluster, JobSpec.read(run).logs) for run in some):
            alike = [run for run in some if (JobSpec.read(run).cluster, JobSpec.read(run).logs) == (cluster, logs)]
            unfinished += run_here(alike, cluster_of(given, cluster), Path(logs), at_once=given.at_once)
    return unfinished


if __name__ == "__main__":
    sys.exit(main())
