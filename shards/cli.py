"""The command `bigtrain-shards`: build, check, show, index."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from shards.adapters import ADAPTERS
from shards.build import Settings, build
from shards.check import check
from shards.describe import describe, read_class_names
from shards.show import show

FAULTS, MISTAKE = 1, 2  # exit codes


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence for a mistake, and the nearest name in it."""

    def error(self, message: str) -> NoReturn:
        given, allowed = "", list[str]()
        if found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            given, allowed = found[1], re.findall(r"[\w-]+", found[2])
        elif found := re.search(r"unrecognized arguments: (-\S+)", message):
            given, allowed = found[1], list(self._option_string_actions)
        near = difflib.get_close_matches(given.split("=")[0], allowed, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        self.exit(MISTAKE, f"{self.prog}: {message}.{hint} See `{self.prog} --help`.\n")


def whole_number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no fraction from 0 to 1")
    return value


def parser() -> Parser:
    top = Parser(prog="bigtrain-shards", description="Pictures to tar shards, and a look at them.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    making = commands.add_parser("build", help="pictures to shards; a killed build continues", allow_abbrev=False)
    adapters = making.add_subparsers(dest="adapter", required=True, metavar="ADAPTER", parser_class=Parser)
    for name, adapter in ADAPTERS.items():
        doc = (sys.modules[adapter.samples.__module__].__doc__ or "").strip()
        sub = adapters.add_parser(name, help=doc.splitlines()[0], description=doc, allow_abbrev=False)
        sub.set_defaults(parser=sub)
        sub.add_argument("--root", required=True, help=adapter.root)
        sub.add_argument("--out", required=True, help="the folder of the shard set, new or begun earlier")
        if adapter.split is not None:
            sub.add_argument(
                "--split", default=adapter.split, help=f"which part of the dataset (default: {adapter.split})"
            )
        sub.add_argument("--samples-per-shard", type=whole_number, default=1000, metavar="N", help="default: 1000")
        sub.add_argument(
            "--max-side",
            type=whole_number,
            metavar="PIXELS",
            help="re-encode pictures whose longer side exceeds this; without it all keep their original bytes",
        )
        sub.add_argument("--name", help="the dataset's name in the manifest, if not the adapter's")
        sub.add_argument("--licence", help="its licence in the manifest, if not the adapter's")
        sub.add_argument(
            "--max-skipped",
            type=fraction,
            default=0.01,
            metavar="FRACTION",
            help="stop when more than this share of the pictures cannot be read (default: 0.01, but one is allowed)",
        )
        sub.add_argument(
            "--workers",
            type=whole_number,
            default=min(8, os.cpu_count() or 1),
            metavar="N",
            help="processes; the result is the same (default: the CPUs, at most 8)",
        )
        for flag, arguments in adapter.options.items():
            sub.add_argument(flag, **arguments)
    checking = commands.add_parser("check", help="is a shard set whole? exit code 1 if not", allow_abbrev=False)
    checking.add_argument("set", metavar="OUT", help="folder or URL of a shard set")
    checking.add_argument("--quick", action="store_true", help="names, sizes and counts only")
    showing = commands.add_parser("show", help="what is in a shard set", allow_abbrev=False)
    showing.add_argument("set", metavar="OUT", help="folder or URL of a shard set")
    indexing = commands.add_parser("index", help="index and manifest for shards that others made", allow_abbrev=False)
    indexing.add_argument("folder", metavar="DIR", help="folder of WebDataset .tar files, which stay as they are")
    indexing.add_argument(
        "--class-names", metavar="FILE", help="a name a line, for classes that are given as numbers from 0"
    )
    indexing.add_argument("--name", help="the dataset's name (default: the folder's)")
    indexing.add_argument("--split", default="train", help="default: train")
    indexing.add_argument("--licence", default="unknown", help="default: unknown")
    indexing.add_argument("--max-skipped", type=fraction, default=0.01, metavar="FRACTION", help="as in build")
    for sub in (checking, showing, indexing):
        sub.set_defaults(parser=sub)
    return top


def run_build(args: argparse.Namespace) -> int:
    adapter = ADAPTERS[args.adapter]
    if "://" in args.out:
        raise ValueError(f"--out {args.out} is a URL, and shards are built on a local disk: build there, then copy.")
    options = {flag: getattr(args, flag) for flag in (f.lstrip("-").replace("-", "_") for f in adapter.options)}
    settings = Settings(
        adapter=args.adapter,
        root=args.root if "://" in args.root else str(Path(args.root).absolute()),
        split=args.split if adapter.split is not None else options["mode"],
        samples_per_shard=args.samples_per_shard,
        max_side=args.max_side,
        name=args.name,
        licence=args.licence,
        options=options,
    )
    build(settings, Path(args.out), workers=args.workers, max_skipped=args.max_skipped)
    return 0


def run_check(args: argparse.Namespace) -> int:
    wrong = check(args.set, quick=args.quick)
    if wrong:
        print("\n".join(wrong))
        print(f"{args.set}: {len(wrong)} faults.")
        return FAULTS
    print(f"{args.set}: right{' in names, sizes and counts' if args.quick else ''}.")
    return 0


def run_show(args: argparse.Namespace) -> int:
    print(show(args.set))
    return 0


def run_index(args: argparse.Namespace) -> int:
    if "://" in args.folder or args.folder.startswith("pipe:"):
        raise ValueError(
            f"{args.folder} is no local folder, and an index is made beside local shards: copy them first."
        )
    names = read_class_names(Path(args.class_names)) if args.class_names else None
    describe(Path(args.folder), names, args.name, args.split, args.licence, args.max_skipped)
    return 0


COMMANDS = {"build": run_build, "check": run_check, "show": run_show, "index": run_index}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one sentence on stderr and exit code 2."""
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return COMMANDS[args.command](args)
    except (ValueError, OSError, ImportError) as error:
        print(f"bigtrain-shards: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("bigtrain-shards: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
