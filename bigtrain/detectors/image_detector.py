"""The base of every saved detector: pictures in, scores out, a threshold, a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from bigtrain.choices import Chosen
from bigtrain.data.decode import Picture
from bigtrain.data.views import Transform
from bigtrain.detectors import DETECTOR_FILE
from bigtrain.files import whole_folder, write_json
from bigtrain.images import UnreadableError
from bigtrain.models.attention import torch_dtype

log = logging.getLogger(__name__)
Given = str | Path | bytes | IO[bytes] | Image.Image | NDArray[np.uint8] | Tensor
"""A picture: a file by its path, its encoded bytes, an open binary file, or open already (`Picture.of`)."""
VERSION = 1  # of detector.json
Unreadable = Literal["nan", "raise"]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a detector turns a picture into a score; kept in detector.json."""

    image_size: int
    precision: Chosen
    batch: int
    """Images a forward pass. Short batches are filled up: a kernel's rounding can depend on the batch's shape."""
    threshold: float | None = None
    """Score above which `threshold_quantile` of the held-out known training images do not lie."""
    threshold_quantile: float | None = None


class Scored(NamedTuple):
    """A batch's scores, float; per patch too where the method has a map, and the class where it knows one."""

    score_B: Tensor
    map_Bhw: Tensor | None = None
    class_B: Tensor | None = None


class ImageDetector:
    """Novelty of pictures. A subclass has `method`, `view`, `score_tensor`, `_write` and `load`.

    Callers test for optional abilities, not for method names: `score_map` (patch by patch), `Scored.class_B` (the
    class shown), `target` and `constant_score` (a prediction, and what predicting the mean would score).
    """

    method: ClassVar[str]
    scoring: Any

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def view(self) -> Transform:
        """What is made of a picture before it is scored."""
        raise NotImplementedError

    def score_tensor(self, image_B3HW: Tensor) -> Scored:
        """Score uint8 views on the detector's device."""
        raise NotImplementedError

    def score_map(self, images: Iterable[Given]) -> NDArray[np.float32] | None:
        """Novelty of each patch of each image, (B, h, w); None where the method has none."""
        return None

    def target(self, image_B3HW: Tensor) -> Tensor:
        """What a detector that scores by errors of a prediction predicts, float32 (B, ...), of uint8 views."""
        raise NotImplementedError

    def constant_score(self, image_B3HW: Tensor, constant: Tensor) -> Tensor:
        """The score (B,) of a predictor that ignores the image and always answers `constant`, (...)."""
        raise NotImplementedError

    def _write(self, folder: Path) -> dict[str, Any]:
        """Write the tensors, and return what detector.json is to say of the method beside the scoring."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, *, device: str | None = None) -> Self:
        raise NotImplementedError

    def score(
        self,
        images: Iterable[Given],
        *,
        unreadable: Unreadable = "nan",
        batch: int | None = None,
        reduced: bool = True,
    ) -> NDArray[np.float64]:
        """Novelty of each image, higher = more novel: shape (B,).

        Args:
            images: pictures, or a generator of them, each as `Given`; of arrays and tensors also one with an axis more.
            unreadable: "nan": a picture that cannot be read scores NaN, and a warning names it; "raise": an error does.
            batch: images of a forward pass; None: as in the run, filled up where there are fewer, which gives the same
                bits as the run. 1 takes one picture's time for one picture; the last digits may differ.
            reduced: decode large JPEGs at a fraction of their size, as the run did. False: a file scores as its pixels
                in an array do; scores of large JPEGs move by up to some percent.

        Raises:
            ValueError: a single picture instead of several, or, with "raise", one that cannot be read.
        """
        parts = [np.zeros(0)]
        for found, is_read_b in self._score(images, unreadable, batch, reduced):
            parts.append(np.full(len(is_read_b), np.nan))
            parts[-1][is_read_b] = found.score_B.double().cpu().numpy()
        return np.concatenate(parts)

    def _score(
        self, images: Iterable[Given], unreadable: Unreadable = "nan", batch: int | None = None, reduced: bool = True
    ) -> Iterator[tuple[Scored, NDArray[np.bool_]]]:
        """The scores of the readable images of each batch, and which of the batch these are."""
        for image_B3HW, is_read_b in self.batches(images, unreadable, batch, reduced):
            if image_B3HW is None:
                yield Scored(torch.zeros(0)), is_read_b
                continue
            found, count = self.score_tensor(image_B3HW), int(is_read_b.sum())
            yield Scored(*(None if part is None else part[:count] for part in found)), is_read_b  # type: ignore[arg-type]

    def batches(
        self, images: Iterable[Given], unreadable: Unreadable = "nan", batch: int | None = None, reduced: bool = True
    ) -> Iterator[tuple[Tensor | None, NDArray[np.bool_]]]:
        """The views of the readable images of each batch, on the detector's device and filled up with black ones; None
        where there are none; and which of the batch these are. See `score`."""
        check_several(images)
        view, size = self.view(), self.scoring.batch if batch is None else batch
        if size < 1 or unreadable not in ("nan", "raise"):
            raise ValueError(f"batch is {size} and unreadable {unreadable!r}: give 1 or more, and 'nan' or 'raise'.")
        rest = enumerate(images)
        while some := list(islice(rest, size)):
            views, is_read_b = [], np.zeros(len(some), bool)
            for place, (number, image) in enumerate(some):
                try:
                    views.append(view(_open(image, reduced=reduced), np.random.default_rng(0))["image"])
                    is_read_b[place] = True
                except (ValueError, OSError) as error:  # of a closed file too
                    named = str(image) if isinstance(image, str | Path) else f"picture {number} (counted from 0)"
                    if unreadable == "raise":
                        raise UnreadableError(f"{named} cannot be scored: {error}") from error
                    log.warning("%s cannot be scored, and its score is NaN: %s", named, error)
            if not views:
                yield None, is_read_b
                continue
            image_B3HW = torch.zeros(size, *views[0].shape, dtype=torch.uint8)
            image_B3HW[: len(views)] = torch.from_numpy(np.stack(views))
            yield image_B3HW.to(self.device), is_read_b

    def autocast(self) -> torch.autocast:
        precision = self.scoring.precision
        return torch.autocast(self.device.type, torch_dtype(precision), enabled=precision != "fp32")

    def calibrate(self, known_score_N: NDArray[np.floating], quantile: float = 0.95) -> float | None:
        """Set the threshold to a score that `quantile` of held-out known images do not exceed; None without images."""
        threshold = calibrated(known_score_N, quantile)
        if threshold is not None:
            self.scoring = replace(self.scoring, threshold=threshold, threshold_quantile=quantile)
        return threshold

    def save(self, folder: Path, **how: Any) -> None:
        """Write detector.json and .safetensors files; the folder appears whole, under its name, at the end.

        Args:
            how: what the method's `_write` takes beside the folder.
        """
        with whole_folder(folder) as unfinished:
            record = {
                "method": self.method,
                "version": VERSION,
                **asdict(self.scoring),
                **self._write(unfinished, **how),
            }
            write_json(unfinished / "detector.json", record)


def calibrated(known_score_N: NDArray[np.floating], quantile: float) -> float | None:
    """A score that `quantile` of held-out known images do not exceed; None without images."""
    return float(np.quantile(known_score_N, quantile, method="higher")) if len(known_score_N) else None


def read_record(folder: Path) -> dict[str, Any]:
    """What detector.json says.

    Raises:
        ValueError: there is none, it is torn, or it is of a newer version.
    """
    file = folder / DETECTOR_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no {DETECTOR_FILE}: give the folder `detector` of a finished run.") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON, so it was cut or changed: copy the detector again.") from error
    version = record.get("version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{file} is no record of a detector: give the folder `detector` of a finished run.")
    if version > VERSION:
        raise ValueError(
            f"{file} is of version {version}, and this bigtrain reads versions up to {VERSION}: install a newer one."
        )
    return record


S = TypeVar("S", bound=Scoring)


def read_scoring(kind: type[S], record: Mapping[str, Any], where: Path, without: Sequence[str] = ()) -> S:
    """How a detector scores, by its record; one with a setting that is not known, or without one, is refused."""
    said = {key: value for key, value in record.items() if key not in ("method", "version", *without)}
    known = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    for what, names in (("has the setting", said.keys() - known), ("lacks the setting", needed - said.keys())):
        if names:
            raise ValueError(
                f"{where / DETECTOR_FILE} {what} {', '.join(sorted(names))}, so another version of bigtrain wrote it: "
                "use that one."
            )
    return kind(**said)


def chosen_device(device: str | None) -> torch.device:
    """Raises ValueError: this machine has no such device."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not available here: give cpu, cuda or cuda:0 ...") from error
    return chosen


def check_several(images: object) -> None:
    """Refuse what is one picture, whose letters, bytes or rows would be taken for many."""
    is_one = isinstance(images, str | Path | bytes | bytearray | memoryview | Image.Image | Mapping)
    is_one = is_one or hasattr(images, "read") or (isinstance(images, Tensor) and images.ndim < 4)
    is_one = is_one or (isinstance(images, np.ndarray) and images.ndim < 4 and images.dtype.kind not in "OUS")
    if is_one or not isinstance(images, Iterable):
        what = type(images).__name__
        hint = "its pictures, such as sorted(folder.glob('*.jpg'))"
        if not (isinstance(images, str | Path) and Path(images).is_dir()):
            hint = "a list, also for one picture: [picture]"
        raise ValueError(f"several pictures are scored, and a single {what} was given: give {hint}.")


def _open(image: Given, *, reduced: bool = True) -> Picture:
    """Raises UnreadableError or OSError."""
    if isinstance(image, bytes | bytearray | memoryview):
        return Picture(bytes(image), reduced=reduced)
    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is no plain file" if path.exists() else "is missing"
            raise UnreadableError(f"not a picture: it {what}")
        return Picture(path.read_bytes(), reduced=reduced)
    if hasattr(image, "read"):
        payload = image.read()
        if not isinstance(payload, bytes):
            raise UnreadableError("the file is open as text: open it with 'rb'")
        return Picture(payload, reduced=reduced)
    if isinstance(image, Image.Image | np.ndarray | Tensor):
        return Picture.of(image)
    raise UnreadableError(
        f"a {type(image).__name__} is no picture: give a path, bytes, an open file, an image of Pillow, or an array or "
        "tensor of uint8"
    )
