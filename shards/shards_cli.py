"""The command `bigtrain-shards`: build, check, show, split, index. Each imports what it needs when it runs, so that
--help is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from bigtrain.files import read_lines
from bigtrain.text import counted, told
from shards.adapters import ADAPTERS
from shards.adapters.lists import warn
from shards.options import MISTAKE, parser

FAULTS = 1  # exit code


def run_build(args: argparse.Namespace) -> int:
    from shards.build import build
    from shards.build_settings import Settings, named_by_folder
    from shards.location import Location

    adapter = ADAPTERS[args.adapter]
    options = {flag: getattr(args, flag) for flag in (f.lstrip("-").replace("-", "_") for f in adapter.options)}
    settings = Settings(
        adapter=args.adapter,
        root=args.root if "://" in args.root else str(Path(args.root).absolute()),
        split=options["mode"] if adapter.split is None else adapter.split if args.split is None else args.split,
        samples_per_shard=args.samples_per_shard,
        max_side=args.max_side,
        name=args.name,
        licence=args.licence,
        options=options,
        quality=args.quality,
        verify=args.verify,
        shuffle_seed=args.shuffle_seed,
    )
    if args.adapter == "folder" and args.split is None:
        out, asked = Location(args.out), settings
        out.check_writable()
        if (settings := named_by_folder(asked, out)) != asked:
            warn(f"{args.root} is taken for the split {settings.split} of {settings.name}: if not, give --split.")
    build(settings, args.out, workers=args.workers, max_skipped=args.max_skipped)
    return 0


def run_check(args: argparse.Namespace) -> int:
    from shards.check import check

    wrong = check(args.set, quick=args.quick, workers=args.workers)
    if wrong:
        print("\n".join(wrong))
        print(f"{args.set}: {counted(wrong.number, 'fault')}.")
        return FAULTS
    print(f"{args.set}: right{' in names, sizes and counts' if args.quick else ''}.")
    return 0


def run_show(args: argparse.Namespace) -> int:
    from shards.contact_sheet import write_page
    from shards.show import readable, show

    if args.page is None and (args.count or args.seed is not None or args.classes):
        raise ValueError("--count, --seed and --classes choose pictures for a page: give --page too.")
    if args.page is not None:  # first, so that a mistake in what it needs prints no table
        page = Path(args.page)
        pictures, lost = write_page(args.set, page, args.count or 120, args.seed or 0, args.classes or ())
    print(show(args.set, all_classes=args.all_classes))
    if args.page is not None:
        print(f"{page}: {counted(pictures, 'picture')}, {readable(page.stat().st_size)}.")
        if lost:
            print(f"{lost} of them cannot be shown; the page says why.")
    return 0


def run_split(args: argparse.Namespace) -> int:
    from shards.split import split_classes, split_per_class, split_shares

    if "://" in args.out:
        raise ValueError(f"--out {args.out} is a URL, and a view is two small local files: write it here, then copy.")
    out, seed = Path(args.out), args.seed or 0
    classes = read_lines(Path(args.classes_file)) if args.classes_file else args.classes
    if args.classes_file and not classes:
        raise ValueError(f"--classes-file {args.classes_file} names no class: give each a line.")
    if classes and args.seed is not None:
        raise ValueError("--seed has no effect on a view of classes, which takes all their samples: leave it out.")
    if args.shares:
        for name, view in split_shares(args.set, out, args.shares, seed).items():
            print(f"{out / name}: {counted(view.samples, 'sample')} in {counted(len(view.shards), 'shard')}.")
        return 0
    if classes:
        view, fewer = split_classes(args.set, out, classes), dict[str, int]()
    else:
        view, fewer = split_per_class(args.set, out, args.per_class, seed)
    of = f"{counted(view.samples, 'sample')} of {counted(len(view.classes), 'class')}"
    print(f"{out}: {of} in {counted(len(view.shards), 'shard')}.")
    if fewer:
        named = ", ".join(f"{name} {count}" for name, count in list(fewer.items())[:20])
        have = "has" if len(fewer) == 1 else "have"
        more = " ..." if len(fewer) > 20 else ""
        print(f"{counted(len(fewer), 'class')} {have} fewer than {args.per_class}: {named}{more}.")
    return 0


def run_index(args: argparse.Namespace) -> int:
    from shards.index_tars import index_tars
    from shards.labels import read_class_names

    names = read_class_names(Path(args.class_names)) if args.class_names else None
    index_tars(
        args.folder,
        names,
        args.name,
        args.split,
        args.licence,
        args.max_skipped,
        out=args.out,
        shards=args.shards,
        workers=args.workers,
        classes_from=args.classes_from,
        allow_unlabelled=args.allow_unlabelled,
    )
    return 0


def os_error_sentence(error: OSError, out: str | None) -> str:
    """A sentence for what the system refused; an error with a sentence of its own keeps it."""
    if error.errno is None or error.filename is None:
        return str(error)
    path, target = Path(str(error.filename)).absolute(), Path(out or "").absolute()
    if out and (str(path).startswith(str(target)) or target.is_relative_to(path)):  # in it, above it, or its .tmp
        return f"--out {out} cannot be made or written ({error.strerror}): give a folder in which you may write."
    return f"{error.filename} cannot be read or written ({error.strerror}): check its name, and your rights to it."


COMMANDS = {"build": run_build, "check": run_check, "show": run_show, "split": run_split, "index": run_index}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # names may not fit the terminal's character set
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args, unknown = parser().parse_known_args(argv)
    if unknown:
        args.parser.refuse(unknown)
    try:
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `show SET | head` has read enough; the interpreter's own flush at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        said = os_error_sentence(error, getattr(args, "out", None)) if isinstance(error, OSError) else told(error)
        warn(" ".join(said.split()))
        return MISTAKE
    except KeyboardInterrupt:
        print("bigtrain-shards: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
