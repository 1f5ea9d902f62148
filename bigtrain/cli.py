"""The command `bigtrain`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from bigtrain.runtime.exit_codes import USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigtrain", description="Inspect bigtrain's runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    live = commands.add_parser("watch", help="a live page of a run in the terminal")
    live.add_argument("run", type=Path, help="the run's folder, what the recipe's --out named")
    live.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (2)")
    live.add_argument("--once", action="store_true", help="print the page once (default without a terminal)")
    tables = commands.add_parser("tables", help="the table of a sweep's finished runs, with intervals")
    tables.add_argument("folder", type=Path, help="of a sweep, or one that holds runs' folders")
    tables.add_argument("--metric", default="auroc", help="a figure of results.json (auroc)")
    tables.add_argument("--plain", action="store_true", help="with a row for each plain figure beside the detectors")
    tables.add_argument(
        "--against", default="", metavar="AXIS=VALUE", help="add paired differences to the runs with this value"
    )
    given = parser.parse_args(argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a frame's lines still shows the figures
    try:
        if given.command == "watch":
            from bigtrain.runtime.watch import watch

            watch(given.run, every_s=given.every, once=given.once)
        else:
            from bigtrain.evaluation.tables import read_results, table  # scipy, which a live page does without

            print(table(read_results(given.folder, plain=given.plain), given.metric, against=given.against))
    except KeyboardInterrupt:
        return 0
    except ValueError as error:
        print(f"bigtrain {given.command}: error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
