"""The command `bigtrain`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from bigtrain.runtime.exit_codes import INTERRUPTED, USER_ERROR
from bigtrain.serving import commands
from bigtrain.text import clean, told

CONTINUED = ("score",)  # commands that continue where they were interrupted


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigtrain", description="Inspect bigtrain's runs, and use their detectors.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    live = subparsers.add_parser("watch", help="a live page of a run in the terminal")
    live.add_argument("run", type=Path, help="the run's folder, what the recipe's --out named")
    live.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (2)")
    live.add_argument("--once", action="store_true", help="print the page once (default without a terminal)")
    live.set_defaults(run_command=_watch)
    tables = subparsers.add_parser("tables", help="the table of a sweep's finished runs, with intervals")
    tables.add_argument("folder", type=Path, help="of a sweep, or one that holds runs' folders")
    tables.add_argument("--metric", default="auroc", help="a figure of results.json (auroc)")
    tables.add_argument("--plain", action="store_true", help="with a row for each plain figure beside the detectors")
    tables.add_argument(
        "--against", default="", metavar="AXIS=VALUE", help="add paired differences to the runs with this value"
    )
    tables.set_defaults(run_command=_tables)
    report = subparsers.add_parser("report", help="several runs in one page, with paired differences")
    report.add_argument("runs", type=Path, nargs="+", help="finished runs that were judged on the same test pictures")
    report.add_argument("--out", type=Path, default=Path("compared.html"), help="the page (compared.html)")
    report.set_defaults(run_command=_report)
    commands.add_to(subparsers)
    given = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a frame's lines still shows the figures
    try:
        return given.run_command(given) or 0
    except KeyboardInterrupt:
        if given.command not in CONTINUED:
            return 0
        print(f"bigtrain {given.command}: interrupted; the same command continues.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("BIGTRAIN_TRACEBACK"):
            traceback.print_exc()
        print(f"bigtrain {given.command}: error: {clean(told(error))}", file=sys.stderr)
        return USER_ERROR


def _watch(given: argparse.Namespace) -> None:
    from bigtrain.runtime.watch import watch

    watch(given.run, every_s=given.every, once=given.once)


def _tables(given: argparse.Namespace) -> None:
    from bigtrain.evaluation.tables import read_results, table  # scipy, which a live page does without

    print(table(read_results(given.folder, plain=given.plain), given.metric, against=given.against))


def _report(given: argparse.Namespace) -> None:
    from bigtrain.evaluation.report.several import report

    report(given.runs, given.out)
    print(given.out)


if __name__ == "__main__":
    sys.exit(main())
