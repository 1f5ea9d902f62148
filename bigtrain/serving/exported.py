"""An exported detector in use: ONNX and OpenVINO without torch, and torch's own .pt2; scored like any other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.decode import Picture
from bigtrain.data.resize import resized
from bigtrain.data.views import CentreCrop, Resized, Transform, Views
from bigtrain.detectors.calibration import Calibration
from bigtrain.detectors.picture_judge import PictureJudge, ScoredViews

METADATA = "bigtrain"  # the key under which a model keeps what `Graph` does not say
FORMAT = 1
Run = Callable[[NDArray[np.uint8]], list[NDArray[Any]]]


@dataclass(frozen=True)
class Scoring:
    """As `image_detector.Scoring`, of an exported model."""

    batch: int
    threshold: float | None


@dataclass(frozen=True)
class ToSize:
    """`image`: the whole picture resized to height x width: the input of a graph that resizes further itself."""

    height: int
    width: int

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Views:
        return {"image": resized(np.array(picture.rgb()), self.height, self.width)}

    def blank(self) -> Views:
        return {"image": np.zeros((3, self.height, self.width), np.uint8)}


class ExportedDetector(PictureJudge):
    """What `bigtrain export` has written."""

    def __init__(self, record: dict[str, Any], run: Run) -> None:
        self.record, self._run = record, run
        self.scoring = Scoring(record["batch"], record["threshold"])
        self.calibration = Calibration.from_record(record["calibration"])
        self.class_names, self.map_side = tuple(record["class_names"]), record["map_side"]
        self.outputs: list[str] = record["outputs"]

    @classmethod
    def load(cls, file: Path, *, device: str | None = None) -> ExportedDetector:
        """Raises ValueError: no model of bigtrain's, or its runtime is not installed."""
        text, run = LOADERS[file.suffix](file, device)
        try:
            record = json.loads(text)
            if record["format"] > FORMAT:
                raise ValueError(
                    f"{file} is of format {record['format']}, and this bigtrain reads {FORMAT}: update it."
                )
            return cls(record, run)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} was not made by `bigtrain export`: give one that was.") from error

    def view(self) -> Transform:
        height, width = self.record["input_size"]
        size, resize = self.record["view"]["size"], self.record["view"]["resize"]
        if self.record["resizes"]:
            return ToSize(height, width)
        return Resized(size) if resize is None else CentreCrop(size, resize)

    def score_views(self, image_B3HW: NDArray[np.uint8]) -> ScoredViews:
        found = dict(zip(self.outputs, self._run(image_B3HW), strict=True))
        return ScoredViews(found["score"].astype(np.float64), found.get("map"), found.get("class"))


def _onnx(file: Path, device: str | None) -> tuple[str, Run]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{file} needs onnxruntime: install bigtrain[onnx].") from error
    on_gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and device != "cpu"
    if device not in (None, "cpu") and not on_gpu:
        raise ValueError(f"device {device!r} is not available to onnxruntime here: give cpu.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_gpu:  # TF32 would leave three digits of a score
        number = int((device or "cuda:0").partition(":")[2] or 0)
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": number, "use_tf32": 0}))
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # its errors are of no common class
        raise ValueError(f"{file} cannot be read as ONNX ({str(error).splitlines()[0]}): export it again.") from error
    (name,) = (each.name for each in session.get_inputs())
    return session.get_modelmeta().custom_metadata_map.get(METADATA, "{}"), lambda x: session.run(None, {name: x})


def _openvino(file: Path, device: str | None) -> tuple[str, Run]:
    try:
        import openvino
    except ImportError as error:
        raise ValueError(f"{file} needs openvino: install bigtrain[openvino].") from error
    try:
        model = openvino.Core().read_model(file)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads()}
        compiled = openvino.compile_model(model, (device or "cpu").upper(), settings)
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read as OpenVINO ({str(error).splitlines()[0]}): export it again."
        ) from error
    text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else "{}"

    def run(image_B3HW: NDArray[np.uint8]) -> list[NDArray[Any]]:
        request = compiled.create_infer_request()  # one for each thread
        found = request.infer([image_B3HW])
        return [np.array(found[output]) for output in compiled.outputs]

    return text, run


def _torch(file: Path, device: str | None) -> tuple[str, Run]:
    import torch

    extra = {METADATA: ""}
    try:
        module = torch.export.load(file, extra_files=extra).module()
    except Exception as error:
        raise ValueError(f"{file} cannot be read as torch's .pt2 ({type(error).__name__}): export it again.") from error
    if device not in (None, "cpu"):
        raise ValueError(f"{file} is a graph for the CPU: give --device cpu, or the detector itself.")

    @torch.no_grad()
    def run(image_B3HW: NDArray[np.uint8]) -> list[NDArray[Any]]:
        return [each.numpy() for each in module(torch.from_numpy(image_B3HW))]

    return extra[METADATA] or "{}", run


def threads() -> int:
    from bigtrain.runtime.launch import threads_of_process

    return threads_of_process()


LOADERS: dict[str, Callable[[Path, str | None], tuple[str, Run]]] = {".onnx": _onnx, ".xml": _openvino, ".pt2": _torch}


def spread(value: NDArray[np.floating]) -> float:
    """The standard deviation, by which differences of scores are measured; 1 where all are equal."""
    found = float(np.nanstd(value)) if value.size else 0.0
    return found if math.isfinite(found) and found > 1e-12 else 1.0
