"""The command `bigtrain-shards`: build, check, show, split, index."""

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
from shards.describe import describe
from shards.labels import read_class_names
from shards.page import write_page
from shards.pictures import VERIFY
from shards.show import readable, show
from shards.split import read_lines, share, split_classes, split_per_class, split_shares

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


def cpus() -> int:
    """The processors that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


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
        sub.add_argument(
            "--out",
            required=True,
            help="the folder of the shard set, new or begun earlier, or a URL to write to (s3://, gs:// ...)",
        )
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
        sub.add_argument(
            "--quality",
            type=whole_number,
            metavar="1..100",
            help="of the JPEG and WebP pictures that --max-side re-encodes (default: 95)",
        )
        sub.add_argument(
            "--verify",
            choices=VERIFY,
            default=VERIFY[0],
            help="structure: the header, and that a file has its end; decode: every pixel, which takes "
            "some ten times as long (default: structure)",
        )
        sub.add_argument(
            "--shuffle-seed",
            type=int,
            metavar="S",
            help="order the samples by seed and key before they go to shards (default: the adapter's order)",
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
            default=cpus(),
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
    showing.add_argument("--all-classes", action="store_true", help="list every class, not only the first 40")
    showing.add_argument(
        "--page", metavar="FILE", help="write a contact sheet too: one HTML file, boxes and masks drawn"
    )
    showing.add_argument("--count", type=whole_number, metavar="N", help="pictures on the page (default: 120)")
    showing.add_argument("--seed", type=int, help="of the choice of pictures for the page (default: 0)")
    showing.add_argument("--classes", nargs="+", metavar="CLASS", help="only pictures of these classes on the page")
    splitting = commands.add_parser(
        "split",
        help="train/val or per-class views of a shard set, which copy no picture",
        description="Views of a shard set: index and manifest of some of its samples, which refer to its tars. "
        "What a view takes follows from seed, keys and classes alone.",
        allow_abbrev=False,
    )
    splitting.add_argument("set", metavar="SET", help="folder or URL of a shard set, or of a view")
    splitting.add_argument(
        "--out", required=True, metavar="DIR", help="a new or empty local folder for the view or views"
    )
    how = splitting.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--shares",
        nargs="+",
        type=share,
        metavar="NAME=SHARE",
        help="views DIR/NAME, which divide all samples, each class alike; say train=0.9 val=0.1",
    )
    how.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="a view DIR of the samples that show any of these classes"
    )
    how.add_argument("--classes-file", metavar="FILE", help="the same, with a class a line")
    how.add_argument("--per-class", type=whole_number, metavar="N", help="a view DIR of N random samples of each class")
    splitting.add_argument("--seed", type=int, help="of --shares and --per-class (default: 0)")
    indexing = commands.add_parser("index", help="index and manifest for shards that others made", allow_abbrev=False)
    indexing.add_argument(
        "folder", metavar="DIR", help="folder or URL of WebDataset .tar files, which stay as they are"
    )
    indexing.add_argument(
        "--out", metavar="VIEW", help="a local folder for index and manifest, where DIR cannot be written"
    )
    indexing.add_argument(
        "--shards",
        metavar="NAMES",
        help="the tars by name, 'train-{000..123}.tar' or a file with a name a line; needed for a web server",
    )
    indexing.add_argument("--workers", type=whole_number, default=cpus(), metavar="N", help="processes, as in build")
    indexing.add_argument(
        "--class-names", metavar="FILE", help="a name a line, for classes that are given as numbers from 0"
    )
    indexing.add_argument("--name", help="the dataset's name (default: the folder's)")
    indexing.add_argument("--split", default="train", help="default: train")
    indexing.add_argument("--licence", default="unknown", help="default: unknown")
    indexing.add_argument("--max-skipped", type=fraction, default=0.01, metavar="FRACTION", help="as in build")
    for sub in (checking, showing, splitting, indexing):
        sub.set_defaults(parser=sub)
    return top


def run_build(args: argparse.Namespace) -> int:
    adapter = ADAPTERS[args.adapter]
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
        quality=args.quality,
        verify=args.verify,
        shuffle_seed=args.shuffle_seed,
    )
    build(settings, args.out, workers=args.workers, max_skipped=args.max_skipped)
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
    if args.page is None and (args.count or args.seed is not None or args.classes):
        raise ValueError("--count, --seed and --classes choose pictures for a page: give --page too.")
    if args.page is not None:  # first, so that a mistake in what it needs prints no table
        page = Path(args.page)
        pictures, lost = write_page(args.set, page, args.count or 120, args.seed or 0, args.classes or ())
    print(show(args.set, all_classes=args.all_classes))
    if args.page is not None:
        print(f"{page}: {pictures} pictures, {readable(page.stat().st_size)}.")
        if lost:
            print(f"{lost} of them cannot be shown; the page says why.")
    return 0


def run_split(args: argparse.Namespace) -> int:
    if "://" in args.out:
        raise ValueError(f"--out {args.out} is a URL, and a view is two small local files: write it here, then copy.")
    out, seed = Path(args.out), args.seed or 0
    classes = args.classes or (read_lines(Path(args.classes_file)) if args.classes_file else None)
    if classes and args.seed is not None:
        raise ValueError("--seed has no effect on a view of classes, which takes all their samples: leave it out.")
    if args.shares:
        for name, view in split_shares(args.set, out, args.shares, seed).items():
            print(f"{out / name}: {view.samples} samples in {len(view.shards)} shards.")
        return 0
    if classes:
        view, fewer = split_classes(args.set, out, classes), dict[str, int]()
    else:
        view, fewer = split_per_class(args.set, out, args.per_class, seed)
    print(f"{out}: {view.samples} samples of {len(view.classes)} classes in {len(view.shards)} shards.")
    if fewer:
        named = ", ".join(f"{name} {count}" for name, count in list(fewer.items())[:20])
        print(f"{len(fewer)} classes have fewer than {args.per_class}: {named}{' ...' if len(fewer) > 20 else ''}.")
    return 0


def run_index(args: argparse.Namespace) -> int:
    names = read_class_names(Path(args.class_names)) if args.class_names else None
    describe(
        args.folder,
        names,
        args.name,
        args.split,
        args.licence,
        args.max_skipped,
        out=args.out,
        shards=args.shards,
        workers=args.workers,
    )
    return 0


COMMANDS = {"build": run_build, "check": run_check, "show": run_show, "split": run_split, "index": run_index}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one sentence on stderr and exit code 2."""
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `show SET | head` has read enough; the interpreter's own flush at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"bigtrain-shards: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("bigtrain-shards: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
