"""Network names checked without importing torch, timm imported without the compiler, and an unreachable hub."""

import importlib
import socket
import sys

import pytest
import torch

from bigtrain.models import hub
from bigtrain.models.lean_timm import disable_at_call, is_compile_supported, timm
from bigtrain.models.timm_names import check_network_name, check_source, check_vit_name, timm_names


def test_names_are_those_of_timm():
    """The names read from timm's source files are those it registers, deprecated ones included."""
    assert timm_names() == set(timm.models._registry._model_entrypoints)
    assert set(timm.list_models()) <= timm_names()


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "vit_base_patch16_224.augreg_in21k", "vit_tiny_patch16_224.x"]
)
def test_a_name_that_timm_has(name):
    """The tag of its weights is left for timm to check."""
    check_vit_name(name)
    check_network_name(name)


def test_a_name_that_timm_lacks():
    """The error suggests up to five similar names, or else a network that exists."""
    with pytest.raises(ValueError, match=r"no model 'resnet5000'; near it: .*resnet50.*; alexnet is torchvision's\."):
        check_network_name("resnet5000")
    with pytest.raises(ValueError, match=r"no model 'zzz'; near it: vit_base_patch16_224\."):
        check_vit_name("zzz")
    check_network_name("alexnet")


def test_a_file_is_no_name(tmp_path):
    """A name that ends like a weights file must exist as a file."""
    with pytest.raises(ValueError, match=r"none\.pth does not exist: give a file of weights"):
        check_source(str(tmp_path / "none.pth"))
    (tmp_path / "some.pth").touch()
    check_source(str(tmp_path / "some.pth"))


def test_imports_restored():
    """The stand-ins used while timm is imported are removed afterwards, and answer as the compiler does."""
    assert torch.compiler.disable is not disable_at_call
    importlib.import_module("torch._dynamo.utils")
    assert sys.modules["torch._dynamo.utils"] is torch._dynamo.utils and hasattr(torch._dynamo.utils, "counters")
    assert is_compile_supported("cuda") == torch._dynamo.utils.is_compile_supported("cuda")
    assert disable_at_call(lambda x, y=1: x + y)(2, y=3) == 5


@pytest.mark.parametrize("answers", [True, False])
def test_the_hub_is_asked_once(monkeypatch, answers):
    """If the hub does not answer, its client uses the cache alone; afterwards the offline setting is restored."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda within_s: answers)
    with hub.from_cache_alone_without_hub():
        assert answers != constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_is_silent(monkeypatch):
    """A host that accepts the connection but never responds is treated as unreachable after a timeout."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not hub.hub_answers(within_s=0.5)
