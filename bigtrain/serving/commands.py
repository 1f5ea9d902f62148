"""The commands that use a detector: their options, and what each calls. Nothing heavy is imported for their help."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

DETECTOR = "a finished run, a detector's folder, hf://user/name, or an exported model (.onnx, .xml, .pt2)"
IMAGES = (
    "a folder, a pattern in quotes, a picture, a shard set or one of its tars, an address, or - for names on standard "
    "input, one a line"
)
Options = TypeVar("Options")


def add_to(subparsers: Any) -> None:
    add_score(subparsers)
    add_calibrate(subparsers)
    add_export(subparsers)
    add_push(subparsers)
    add_serve(subparsers)


def filled(options: type[Options], given: argparse.Namespace, **other: Any) -> Options:
    """A command's Options from its words, which have the same names."""
    values = {**vars(given), **other}
    return options(**{field.name: values[field.name] for field in fields(options)})  # type: ignore[arg-type]


def add_score(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "score",
        help="score pictures with a detector, in a table",
        description="Score each picture once: path, score, p_value, novel, class, why_not (of one that cannot be read, "
        "of which there are some where the exit code is 3). The same command continues one that was stopped. On "
        "several GPUs: torchrun --nproc-per-node 8 -m bigtrain.cli score ..., accelerate launch -m, or srun.",
    )
    parser.add_argument("--detector", required=True, help=DETECTOR)
    parser.add_argument("--images", required=True, help=IMAGES)
    parser.add_argument("--out", required=True, type=Path, help="the table: .parquet, .csv or .jsonl")
    parser.add_argument("--threshold", default="", help="p=0.05, false-alarms=0.02 or score=0.7 (the detector's own)")
    parser.add_argument("--known", nargs="+", default=(), metavar="CLASS", help="classes (folders) that are known: "
                        "the summary then says how many were flagged, and how many others missed")  # fmt: skip
    parser.add_argument("--maps", type=Path, metavar="DIR", help="write patch scores laid over each picture here")
    parser.add_argument("--maps-raw", type=Path, metavar="DIR", help="write patch scores as arrays (.npy) here")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="write a page of the most novel pictures")
    parser.add_argument("--top", type=int, default=50, help="how many pictures that page has (50)")
    parser.add_argument("--copy-novel", type=Path, metavar="DIR", help="copy novel pictures here")
    parser.add_argument("--link-novel", type=Path, metavar="DIR", help="link novel pictures here")
    parser.add_argument("--resume", action="store_true", help="add pictures that are new to a finished table")
    parser.add_argument("--watch", action="store_true", help="stay, and add pictures to the table (.csv, .jsonl) as "
                        "they come into the folder; a file is judged once, when its size has settled; batches are as "
                        "small as what has come, so the last digits of scores may differ")  # fmt: skip
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="with --watch: seconds between looks (2)")
    parser.add_argument("--device", help="cpu, cuda or cuda:0 (a GPU where there is one)")
    parser.add_argument("--batch", type=int, help="pictures of a forward pass (the run's, for the run's very scores)")
    parser.add_argument("--allow-private", action="store_true", help="allow addresses in the private network")
    parser.set_defaults(run_command=_score)


def _score(given: argparse.Namespace) -> int:
    from bigtrain.serving.score import score
    from bigtrain.serving.score_job import Options

    if given.batch is not None and given.batch < 1:
        raise ValueError(f"--batch {given.batch} must be at least 1.")
    if given.top < 1:
        raise ValueError(f"--top {given.top} must be at least 1.")
    options = filled(Options, given, known=tuple(given.known))
    if given.watch:
        from bigtrain.serving.watch_folder import watch_folder

        return watch_folder(options, every_s=given.every)
    return score(options)


def add_calibrate(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="set a detector's threshold by other normal pictures, without training",
        description="Score normal pictures, keep their scores in detector.json for p-values and thresholds, and say "
        "whether they look like those that were kept before.",
    )
    parser.add_argument("--detector", required=True, help="a finished run, or a detector's folder")
    parser.add_argument("--normal", required=True, help=f"normal pictures: {IMAGES}")
    parser.add_argument("--percentile", type=float, default=95.0, help="of their scores, for the threshold (95)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a copy here, and leave the detector as it is")
    parser.add_argument("--device", help="cpu, cuda or cuda:0 (a GPU where there is one)")
    parser.add_argument("--allow-private", action="store_true", help="allow addresses in the private network")
    parser.set_defaults(run_command=_calibrate)


def _calibrate(given: argparse.Namespace) -> int:
    from bigtrain.serving.calibrate import Options, calibrate

    return calibrate(filled(Options, given))


def add_export(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a detector as ONNX, OpenVINO or torch's .pt2",
        description="Write one graph with resizing, normalisation, networks, score, p-value, map and class. Both are "
        "run on pictures of the run's test split; where the export does not score as the detector does, the table is "
        "printed, nothing is written, and the exit code is 4.",
    )
    parser.add_argument("--detector", required=True, help="a finished run, a detector's folder, or hf://user/name")
    parser.add_argument("--to", required=True, choices=("onnx", "openvino", "torch"))
    parser.add_argument("--out", type=Path, help="the file: .onnx, .xml or .pt2 (the run's name, here)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "int8"), help="(fp32)")
    parser.add_argument("--input-size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the graph's input, "
                        "which it resizes itself (the size that the detector sees: nothing to resize)")  # fmt: skip
    parser.add_argument("--images", default="", help=f"pictures to compare on (the run's): {IMAGES}")
    parser.add_argument("--pictures", type=int, default=400, help="how many are compared (400)")
    parser.set_defaults(run_command=_export)


def _export(given: argparse.Namespace) -> int:
    from bigtrain.serving.export import Options, export

    return export(filled(Options, given, input_size=tuple(given.input_size) if given.input_size else None))


def add_push(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "push",
        help="upload a detector to Hugging Face's hub",
        description="Upload detector.json, the weights and the card; load_detector and --detector take hf://USER/NAME.",
    )
    parser.add_argument("--detector", required=True, help="a finished run, or a detector's folder")
    parser.add_argument("--to", required=True, metavar="USER/NAME", help="its name on the hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--without-pictures", action="store_true", help="leave the pictures around the threshold out")
    parser.set_defaults(run_command=_push)


def _push(given: argparse.Namespace) -> int:
    from bigtrain.serving.push import Options, push

    return push(filled(Options, given))


def add_serve(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="a detector behind HTTP, with a page to drop pictures on",
        description="POST /v1/score takes a picture as the body, or several as files named image of a form; ?map=true "
        "adds patch scores. /healthz, /metrics (Prometheus), /openapi.json; the page is at /.",
    )
    parser.add_argument("--detector", required=True, help=DETECTOR)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="(8000); 0: any that is free")
    parser.add_argument("--threshold", default="", help="p=0.05, false-alarms=0.02 or score=0.7 (the detector's own)")
    parser.add_argument("--device", help="cpu, cuda or cuda:0 (a GPU where there is one)")
    parser.add_argument("--batch", type=int, default=32, help="most pictures of a forward pass (32)")
    parser.add_argument("--max-wait-ms", type=float, default=10.0, help="how long a picture waits for others (10)")
    parser.add_argument("--max-mb", type=float, default=32.0, help="of a request, else 413 (32)")
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="of a picture, else 422 (50 000 000)")
    parser.add_argument("--queue", type=int, default=256, help="pictures that may wait, else 429 (256)")
    parser.add_argument("--deadline-s", type=float, default=30.0, help="of a request, else 503 (30)")
    parser.set_defaults(run_command=_serve)


def _serve(given: argparse.Namespace) -> int:
    from bigtrain.serving.serve import Options, serve

    return serve(filled(Options, given))
