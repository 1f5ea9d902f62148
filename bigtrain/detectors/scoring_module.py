"""Any detector as a torch module, uint8 images in, score and map out: to be exported, or built on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bigtrain.detectors.image_detector import ImageDetector, Scored
from bigtrain.detectors.network_detector import NetworkDetector


class ScoringModule(nn.Module):
    """`forward(image_B3HW)`: uint8 images of the detector's size to (score_B, map_Bhw); the map is None where the
    method has none. Scores are those of `detector.score` for the same pixels, in fp32 on the same device.

    Raises:
        ValueError: the detector cannot be written as a graph; it says why.
    """

    def __init__(self, detector: ImageDetector) -> None:
        super().__init__()
        self.detector = in_fp32(detector)
        self.networks = nn.ModuleList(networks_of(detector))  # so that .parameters() and .to() find them
        self.features: nn.Module | None = None
        if isinstance(detector, NetworkDetector):
            from bigtrain.detectors.feature_module import FeatureModule

            self.features = FeatureModule(detector.detector).to(detector.device)
        self.eval()

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.scored(image_B3HW)
        return found.score_B, found.map_Bhw

    def scored(self, image_B3HW: Tensor) -> Scored:
        """With the class too, where the detector tells classes apart."""
        if self.features is None:
            return self.detector.score_tensor(image_B3HW)
        assert isinstance(self.detector, NetworkDetector)
        with torch.no_grad():
            outputs_BD = self.detector.outputs(image_B3HW)
            class_B = outputs_BD.argmax(dim=1) if self.detector.class_names else None
            return Scored(self.features(outputs_BD), class_B=class_B)


def in_fp32(detector: ImageDetector) -> ImageDetector:
    """The same networks, scored in fp32, whatever the run scored in."""
    from copy import copy

    same = copy(detector)
    same.scoring = replace(detector.scoring, precision="fp32")
    return same


def networks_of(detector: ImageDetector) -> list[nn.Module]:
    """The modules that a detector computes with."""
    if isinstance(detector, NetworkDetector):
        return [detector.layer, *detector.network.heads.values()]
    return [value.vit for value in vars(detector).values() if hasattr(value, "vit")]
