"""A detector on the features of a network's layer, or on the logits of its head: every method that is not DEFEND."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.views import CentreCrop
from bigtrain.detectors import image_detector
from bigtrain.detectors.catalogue import detector_class, name_of
from bigtrain.detectors.feature_detector import FeatureDetector
from bigtrain.detectors.image_detector import ImageDetector, Scored, chosen_device
from bigtrain.detectors.record import read_record, read_scoring
from bigtrain.models.load_network import load_network
from bigtrain.models.network import Network
from bigtrain.models.read_weights import read_tensors
from bigtrain.models.weights import save_tensors

NETWORK_FILE, FITTED_FILE = "network.safetensors", "fitted.safetensors"


@dataclass(frozen=True, kw_only=True)
class Scoring(image_detector.Scoring):
    resize: int  # The whole picture is resized to this side, and the centre of it is seen.
    layer: str  # Whose features are scored; "": the trunk's end.
    head: str  # Whose logits are scored; "": features.


class NetworkDetector(ImageDetector):
    """A network, and a detector that was fitted to what it gives.

    Where the network has a head of the known classes, it also says which of them a picture shows.
    """

    method: ClassVar[str] = "network"

    def __init__(self, network: Network, detector: FeatureDetector, scoring: Scoring) -> None:
        self.network, self.detector, self.scoring = network, detector, scoring
        self.layer = network.pooled(scoring.layer)

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.network.classes[self.scoring.head]) if self.scoring.head else ()

    @property
    def device(self) -> torch.device:
        return self.network.device

    def view(self) -> CentreCrop:
        return CentreCrop(self.scoring.image_size, self.scoring.resize)

    @torch.no_grad()
    def features_of(self, image_B3HW: Tensor) -> Tensor:
        """The layer's features for uint8 views, float32."""
        with self.autocast():
            return self.layer(self.network.normalise(image_B3HW)).float()

    @torch.no_grad()
    def outputs(self, image_B3HW: Tensor) -> Tensor:
        """What the detector is fitted to, for uint8 views: features, or the head's logits of them; float32."""
        features_BD = self.features_of(image_B3HW)
        return self.network.heads[self.scoring.head](features_BD) if self.scoring.head else features_BD

    @torch.no_grad()
    def logits_of(self, features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits of the head for features of the trunk's end."""
        head = self.network.heads[self.scoring.head]
        return head(torch.from_numpy(features_ND).to(self.device)).float().cpu().numpy()

    def score_tensor(self, image_B3HW: Tensor) -> Scored:
        outputs = self.outputs(image_B3HW)
        score_B = torch.from_numpy(self.detector.score(outputs.cpu().numpy())).to(outputs.device)
        return Scored(score_B, class_B=outputs.argmax(dim=1) if self.scoring.head else None)

    def _write(self, folder: Path, network_in: Path | None = None) -> dict[str, Any]:
        """As every detector's.

        Args:
            network_in: a detector's folder with the very same network, whose file is shared where the disk has links.
        """
        is_shared = False
        if network_in is not None:
            with suppress(OSError):
                os.link(network_in / NETWORK_FILE, folder / NETWORK_FILE)
                is_shared = True
        if not is_shared:
            self.network.save(folder / NETWORK_FILE)
        about, arrays = state_of(self.detector)
        save_tensors(folder / FITTED_FILE, {k: torch.from_numpy(v) for k, v in arrays.items()}, {})
        return {"detector": about}

    @classmethod
    def _load(cls, folder: Path, *, device: str | None = None) -> NetworkDetector:
        record = read_record(folder)
        scoring = read_scoring(Scoring, record, folder, without=["detector"])
        try:
            arrays = {name: value.numpy() for name, value in read_tensors(folder / FITTED_FILE)[0].items()}
            detector = with_state(record["detector"], arrays)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder} holds no detector that this bigtrain reads ({type(error).__name__}: {error}): it was "
                "written by another version, or changed."
            ) from error
        network = load_network(folder / NETWORK_FILE, device=chosen_device(device))
        return cls(network, detector, scoring)


def state_of(detector: FeatureDetector) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A fitted detector as JSON and arrays: what its constructor was given, and what it has learned."""
    values = vars(detector)
    learned = {key: value for key, value in values.items() if key.endswith("_")}
    arrays = {k: np.ascontiguousarray(v) for k, v in learned.items() if isinstance(v, np.ndarray) and k != "classes_"}
    about = {
        "name": name_of(detector),
        "options": {key: value for key, value in values.items() if not key.endswith("_")},
        "learned": {k: v for k, v in learned.items() if not isinstance(v, np.ndarray)}
        | ({"classes_": detector.classes_.tolist()} if "classes_" in learned else {}),
    }
    return json.loads(json.dumps(about)), arrays


def with_state(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> FeatureDetector:
    """The detector that `state_of` wrote down."""
    detector = detector_class(about["name"])(**about["options"])
    for name, value in (about["learned"] | arrays).items():
        setattr(detector, name, np.asarray(value) if name == "classes_" else value)
    return detector
