"""The commands of `bigtrain-shards` and their options."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NoReturn

from shards.adapters import ADAPTERS
from shards.labels import CLASSES_FROM
from shards.treatment import VERIFY

MISTAKE = 2  # exit code
MAX_NAMED = 3  # unknown arguments: a forgotten quote around photos/* gives hundreds


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence for a mistake, and the nearest name in it."""

    given: Sequence[str] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.set_defaults(parser=self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        first = sorted(unknown, key=lambda argument: not argument.startswith("-"))  # options before what follows them
        more = f" and {len(first) - MAX_NAMED} more" if len(first) > MAX_NAMED else ""
        self.error(f"unrecognized arguments: {' '.join(first[:MAX_NAMED])}{more}")

    def error(self, message: str) -> NoReturn:
        options = [argument.split("=")[0] for argument in self.given if argument.startswith("--")]
        unknown = [option for option in options if option not in self._option_string_actions]
        if "required" in message and unknown:  # a misspelled one is often what is missed
            self.refuse(unknown)
        given, allowed = "", list[str]()
        if found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            given, allowed = found[1], re.findall(r"[\w-]+", found[2])
        elif found := re.search(r"unrecognized arguments: (-\S+)", message):
            given, allowed = found[1], list(self._option_string_actions)
        near = difflib.get_close_matches(given.split("=")[0], allowed, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        self.exit(MISTAKE, f"{self.prog}: {message}.{hint} See `{self.prog} --help`.\n")


def share(text: str) -> tuple[str, Fraction]:
    """Read NAME=SHARE."""
    found = re.fullmatch(r"([A-Za-z0-9_-]+)=(0?\.\d{1,6}|1(?:\.0*)?)", text)
    if not found or not Fraction(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SHARE with a share from 0.000001 to 1, as in val=0.1")
    return found[1], Fraction(found[2])


def whole_number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def cpus() -> int:
    """The processors that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def parser() -> Parser:
    top = Parser(prog="bigtrain-shards", description="Pictures to tar shards, and a look at them.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_build, add_check, add_show, add_split, add_index):
        add(commands)
    return top


def add_build(commands: Any) -> None:
    making = commands.add_parser("build", help="pictures to shards; a killed build continues")
    adapters = making.add_subparsers(dest="adapter", required=True, metavar="ADAPTER")
    for name, adapter in ADAPTERS.items():
        doc = adapter.doc or (sys.modules[adapter.samples.__module__].__doc__ or "").strip()
        sub = adapters.add_parser(name, help=doc.splitlines()[0], description=doc)
        sub.add_argument("--root", required=True, help=adapter.root)
        if adapter.split is not None:
            where = "the last part of ROOT where that is train, val or test, else " if name == "folder" else ""
            sub.add_argument("--split", help=f"which part of the dataset (default: {where}{adapter.split})")
        add_build_options(sub)
        for flag, arguments in adapter.options.items():
            sub.add_argument(flag, **arguments)


def add_build_options(sub: Parser) -> None:
    sub.add_argument(
        "--out",
        required=True,
        help="the folder of the shard set, new or begun earlier, or a URL to write to (s3://, gs:// ...)",
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
        help="stop when more than this share of the pictures is unreadable (default: 0.01; unless 0, one may be)",
    )
    add_workers(sub)


def add_workers(sub: Parser) -> None:
    text = "processes; the result is the same (default: the CPUs, at most 8)"
    sub.add_argument("--workers", type=whole_number, default=cpus(), metavar="N", help=text)


def add_check(commands: Any) -> None:
    checking = commands.add_parser("check", help="verify a shard set; exit code 1 if it has faults")
    checking.add_argument("set", metavar="OUT", help="folder or URL of a shard set")
    checking.add_argument("--quick", action="store_true", help="names, sizes and counts only")
    add_workers(checking)


def add_show(commands: Any) -> None:
    showing = commands.add_parser("show", help="what is in a shard set")
    showing.add_argument("set", metavar="OUT", help="folder or URL of a shard set")
    showing.add_argument("--all-classes", action="store_true", help="list every class, not only the first 40")
    showing.add_argument(
        "--page", metavar="FILE", help="write a contact sheet too: one HTML file, boxes and masks drawn"
    )
    showing.add_argument("--count", type=whole_number, metavar="N", help="pictures on the page (default: 120)")
    showing.add_argument("--seed", type=int, help="seed for choosing the pictures of the page (default: 0)")
    showing.add_argument("--classes", nargs="+", metavar="CLASS", help="only pictures of these classes on the page")


def add_split(commands: Any) -> None:
    splitting = commands.add_parser(
        "split",
        help="train/val or per-class views of a shard set, which copy no picture",
        description="Views of a shard set: index and manifest of some of its samples, which refer to its tars. "
        "What a view takes follows from seed, keys and classes alone.",
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
        help="views DIR/NAME that divide all samples, and each class, by these shares, e.g. train=0.9 val=0.1",
    )
    how.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="a view DIR of the samples that show any of these classes"
    )
    how.add_argument("--classes-file", metavar="FILE", help="the same, with a class a line")
    how.add_argument("--per-class", type=whole_number, metavar="N", help="a view DIR of N random samples of each class")
    splitting.add_argument("--seed", type=int, help="seed of --shares and --per-class (default: 0)")


def add_index(commands: Any) -> None:
    indexing = commands.add_parser(
        "index",
        help="index and manifest for shards that others made",
        description="Index and manifest for WebDataset shards that others made, which stay as they are. The classes of "
        'a sample are those of its .json ("classes", "label" or "class"); without a class there, of its .cls; then, '
        "if it has no .json, the text of its .txt. A name or number each; or see --classes-from.",
    )
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
    add_workers(indexing)
    indexing.add_argument(
        "--class-names", metavar="FILE", help="a name a line, for classes that are given as numbers from 0"
    )
    indexing.add_argument(
        "--classes-from",
        choices=CLASSES_FROM,
        default=CLASSES_FROM[0],
        help="members: .json, .cls or .txt, as above; folder: the class of a/cat/0001.jpg is cat (default: members)",
    )
    indexing.add_argument(
        "--allow-unlabelled", action="store_true", help="some samples may have no class; they show none"
    )
    indexing.add_argument("--name", help="the dataset's name (default: the folder's)")
    indexing.add_argument("--split", default="train", help="default: train")
    indexing.add_argument("--licence", default="unknown", help="default: unknown")
    indexing.add_argument("--max-skipped", type=fraction, default=0.01, metavar="FRACTION", help="as in build")
