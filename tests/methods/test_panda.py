"""The compactness loss by hand, and which layers learn by it."""

import pytest
import torch
from torch import nn

from bigtrain.methods.panda.equations import compactness_loss, freeze_all_but


def test_compactness_loss_by_hand():
    """Squared distances to the centre (1, 0): 1 and 0 + 4, over two features; its gradient is 2 (phi - c) / D."""
    features_BD = torch.tensor([[2.0, 0.0], [1.0, 2.0]], requires_grad=True)
    loss_B = compactness_loss(features_BD, torch.tensor([1.0, 0.0]))
    assert loss_B.tolist() == [0.5, 2.0]
    loss_B.sum().backward()
    assert features_BD.grad.tolist() == [[1.0, 0.0], [0.0, 2.0]]


def test_layers_that_learn():
    """Only the named layers are trained; an unknown name, or one without weights, is refused."""
    network = nn.Sequential()
    network.add_module("layer1", nn.Linear(2, 2))
    network.add_module("pool", nn.Identity())
    network.add_module("layer2", nn.Linear(2, 2))
    learning = [name for name, p in freeze_all_but(network, ["layer2"]).named_parameters() if p.requires_grad]
    assert learning == ["layer2.weight", "layer2.bias"]
    with pytest.raises(ValueError, match="names layer3, and the network has layer1, pool, layer2"):
        freeze_all_but(network, ["layer3"])
    with pytest.raises(ValueError, match="pool have no weights to learn"):
        freeze_all_but(network, ["pool"])
