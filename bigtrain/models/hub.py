"""Released weights from the hub or its cache; an unreachable hub is an error within seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from bigtrain.choices import HUB
from bigtrain.models.lean_timm import timm, torchvision
from bigtrain.models.timm_names import ALEXNET

WITHIN_S = 5.0


def released_weights(name: str) -> dict[str, Tensor]:
    """The state_dict of a timm network, or torchvision's AlexNet, with the weights that its name stands for.

    Raises:
        Exception: they cannot be downloaded; the hub's client, the network and timm each have errors of their own.
    """
    if name == ALEXNET:
        return torchvision.models.alexnet(weights="DEFAULT").state_dict()
    with from_cache_alone_without_hub():
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()


def downloaded(source: str) -> Path:
    """The folder of a model of the hub, from its cache where it is there: hf-hub:org/name, or org/name.

    Raises:
        ValueError: it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    name = next((source.removeprefix(prefix) for prefix in HUB if source.startswith(prefix)), source)
    name, _, revision = name.partition("@")
    wanted = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        with from_cache_alone_without_hub():
            return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the hub's client and the network have errors of their own
        raise ValueError(
            f"{name} cannot be downloaded from the hub ({type(error).__name__}): check its name and the connection, or "
            "give a local folder with its config.json and .safetensors."
        ) from error


def downloaded_detector(source: str) -> Path:
    """The folder of a detector on the hub, from its cache where it is there: user/name, or user/name@revision.

    Raises:
        ValueError: it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = source.strip("/").partition("@")
    try:
        with from_cache_alone_without_hub():
            return Path(
                snapshot_download(name, revision=revision or None, allow_patterns=["detector.json", "*.safetensors"])
            )
    except Exception as error:  # the hub's client and the network have errors of their own
        raise ValueError(
            f"hf://{source} cannot be downloaded from the hub ({type(error).__name__}): check its name and the "
            "connection, or give a local folder."
        ) from error


@contextmanager
def from_cache_alone_without_hub() -> Iterator[None]:
    """If the hub does not answer, use the cache alone; its client would retry for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_answers(WITHIN_S)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answers(within_s: float) -> bool:
    """Whether the hub answers at all, asked through its client, which knows of proxies and mirrors."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: list[object] = []

    def ask() -> None:
        with suppress(Exception):  # each HTTP client has its own network errors
            answers.append(get_session().head(constants.ENDPOINT, timeout=within_s))

    thread = threading.Thread(target=ask, daemon=True)  # DNS lookup ignores the timeout
    thread.start()
    thread.join(within_s)
    return bool(answers)
