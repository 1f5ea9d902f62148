"""`bigtrain export`: a detector as ONNX, OpenVINO or torch's .pt2; written only if it scores as the detector does."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bigtrain
from bigtrain.detectors import DETECTOR_FILE, detector_folder, load_detector
from bigtrain.detectors.image_detector import ImageDetector
from bigtrain.detectors.record import sha256_of
from bigtrain.files import whole_file
from bigtrain.runtime.exit_codes import DISAGREES
from bigtrain.runtime.launch import threads_of_process
from bigtrain.serving.agreement import agreement, pictures_to_compare
from bigtrain.serving.exported import FORMAT, METADATA, ExportedDetector
from bigtrain.serving.graph import Graph, Size, checked_size

OPSET = 20
ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "openvino": ("fp32", "fp16"), "torch": ("fp32",)}


@dataclass(frozen=True)
class Options:
    """Of the command; see its help."""

    detector: str
    to: str
    out: Path | None
    precision: str
    input_size: Size | None
    images: str
    pictures: int


def export(options: Options) -> int:
    """Write the graph to a temporary folder, compare, and move it to its place; returns the exit code.

    Raises:
        ValueError: a mistake in the command, or a detector that no graph holds; nothing has been written.
    """
    folder = detector_folder(options.detector)
    out = checked_out(options, folder)
    torch.set_num_threads(threads_of_process())
    detector = load_detector(folder, device="cpu")
    checked_size(detector, options.input_size)
    graph = Graph(detector, options.input_size)
    compared = pictures_to_compare(folder, options.images, options.pictures)
    precision = detector.scoring.precision
    also = "" if precision == "fp32" else f" (the detector in fp32; its run scored in {precision})"
    print(f"comparing on {compared}{also}", flush=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as place:
        file = Path(place, out.name)
        with quiet():
            write(graph, options, file, json.dumps(record_of(folder, detector, graph, options)))
        found = agreement(graph.scorer.detector, ExportedDetector.load(file, device="cpu"), compared, options.precision)
        print(found.table(), flush=True)
        if not found.agrees:
            print(f"{out} is not written: {found.why_not}", flush=True)
            return DISAGREES
        for part in sorted(Path(place).iterdir(), key=lambda each: each.suffix == out.suffix):  # the graph last
            with whole_file(out.parent / part.name) as target, part.open("rb") as source:
                shutil.copyfileobj(source, target)
    height, width = graph.input_size
    print(
        f"{out}: input uint8 (batch, 3, {height}, {width}), RGB; outputs {', '.join(graph.outputs)}; "
        f"{options.precision}{f', opset {OPSET}' if options.to == 'onnx' else ''}",
        flush=True,
    )
    return 0


def checked_out(options: Options, folder: Path) -> Path:
    if options.precision not in PRECISIONS[options.to]:
        raise ValueError(
            f"--precision {options.precision} is not there for --to {options.to}, which has "
            f"{' and '.join(PRECISIONS[options.to])}."
        )
    ending = ENDINGS[options.to]
    name = folder.name if folder.name != "detector" else folder.resolve().parent.name
    out = options.out or Path(f"{name}{'' if options.precision == 'fp32' else f'-{options.precision}'}{ending}")
    if out.suffix != ending:
        raise ValueError(f"--out {out} must end in {ending} for --to {options.to}.")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist: make it, or name another.")
    for file in (out, out.with_suffix(".bin")) if options.to == "openvino" else (out,):
        if file.exists():
            raise ValueError(f"--out {out}: {file} exists: give another name, or remove it.")
    needs = {
        "onnx": ("onnx", "onnxscript", "onnxruntime"),
        "openvino": ("openvino", "onnx", "onnxscript", "onnxruntime"),
        "torch": (),
    }[options.to]
    from importlib.util import find_spec

    if missing := [each for each in needs if find_spec(each) is None]:
        raise ValueError(f"--to {options.to} needs {', '.join(missing)}: install bigtrain[{options.to}].")
    return out


def record_of(folder: Path, detector: ImageDetector, graph: Graph, options: Options) -> dict[str, Any]:
    """What the exported model keeps beside its graph."""
    view = detector.view()
    return {
        "format": FORMAT,
        "bigtrain": bigtrain.__version__,
        "detector_sha256": sha256_of(folder / DETECTOR_FILE),
        "method": detector.method,
        "precision": options.precision,
        "input_size": list(graph.input_size),
        "resizes": graph.resize is not None,
        "view": {"size": detector.scoring.image_size, "resize": getattr(view, "resize", None)},
        "batch": detector.scoring.batch,
        "threshold": detector.scoring.threshold,
        "calibration": detector.calibration.record() if len(detector.calibration) else None,
        "class_names": list(detector.class_names),
        "map_side": detector.map_side,
        "outputs": graph.outputs,
    }


def write(graph: Graph, options: Options, file: Path, record: str) -> None:
    """Raises ValueError: the library refuses the graph."""
    try:
        program = traced(graph)
        {"onnx": write_onnx, "openvino": write_openvino, "torch": write_torch}[options.to](
            program, graph, file, record, options.precision
        )
    except ValueError:
        raise
    except Exception as error:  # of torch's exporters and their libraries
        said = str(error).strip().splitlines()
        raise ValueError(
            f"this detector cannot be exported to {options.to}: {type(error).__name__}: {said[0] if said else ''}"
        ) from error


def traced(graph: Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        return torch.export.export(graph, (graph.example(3),), dynamic_shapes=({0: batch},), strict=False)


def write_onnx(program: Any, graph: Graph, file: Path, record: str, precision: str) -> None:
    import onnx

    made = torch.onnx.export(
        program, (graph.example(3),), dynamo=True, opset_version=OPSET, input_names=["image"],
        output_names=list(graph.outputs), verbose=False, optimize=False,  # which the runtime does, and faster
    )  # fmt: skip
    assert made is not None
    model = folded(made.model_proto, file)
    if precision == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(model, keep_io_types=True)
    elif precision == "int8":
        model = quantised(model, file)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, record
    onnx.save(model, file)


def folded(model: Any, file: Path) -> Any:
    """With what does not depend on the picture computed once, such as the positions for its size; runtimes differ in
    how they would resample them."""
    import onnx
    import onnxruntime

    before, after = file.with_suffix(".before"), file.with_suffix(".after")
    onnx.save(model, before)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # of ONNX's own operators
    options.optimized_model_filepath = str(after)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
    return taken(before, after)


def taken(before: Path, after: Path) -> Any:
    import onnx

    found = onnx.load(after)
    before.unlink()
    after.unlink()
    return found


def quantised(model: Any, file: Path) -> Any:
    """Weights of matrix products as 8-bit integers, activations quantised as they come (dynamic quantisation)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before, after = file.with_suffix(".before"), file.with_suffix(".after")
    onnx.save(model, before)
    quantize_dynamic(
        before, after, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
    )
    return taken(before, after)


def write_openvino(program: Any, graph: Graph, file: Path, record: str, precision: str) -> None:
    import openvino

    between = file.with_suffix(".onnx")  # OpenVINO reads more of ONNX than of torch's graphs
    write_onnx(program, graph, between, record, "fp32")
    model = openvino.convert_model(between)
    between.unlink()
    model.set_rt_info(record, [METADATA])
    openvino.save_model(model, file, compress_to_fp16=precision == "fp16")


def write_torch(program: Any, graph: Graph, file: Path, record: str, precision: str) -> None:
    torch.export.save(program, file, extra_files={METADATA: record})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters print and warn of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
