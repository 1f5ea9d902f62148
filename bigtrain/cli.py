"""The command `bigtrain`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from bigtrain.runtime.watch import watch

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bigtrain", description="Look after bigtrain's runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    live = commands.add_parser("watch", help="a live page of a run in the terminal")
    live.add_argument("run", type=Path, help="the run's folder, what the recipe's --out named")
    live.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (2)")
    live.add_argument("--once", action="store_true", help="print the page once; so it is without a terminal")
    given = parser.parse_args(argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a frame's lines still shows the figures
    try:
        watch(given.run, every_s=given.every, once=given.once)
    except KeyboardInterrupt:
        return 0
    except ValueError as error:
        print(f"bigtrain watch: error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
