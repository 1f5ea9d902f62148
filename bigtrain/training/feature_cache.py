"""A network's outputs for many images, computed once, kept in safetensors files and reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.error_budget import ErrorBudget
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.stream import Stream
from bigtrain.data.views import Transform
from bigtrain.detectors.network_detector import NetworkDetector
from bigtrain.files import remove_unfinished
from bigtrain.models.network import Network
from bigtrain.models.read_weights import read_tensors
from bigtrain.models.weights import save_tensors
from bigtrain.progress import Progress

if TYPE_CHECKING:
    from bigtrain.training.run_setup import Setup


class Features(NamedTuple):
    """Of some images in the order of the index: their numbers, float32 (N, ...); and those that were not decoded."""

    sample_N: NDArray[np.int64]
    features_ND: NDArray[np.float32]
    skipped: dict[str, str]  # key -> why

    def of(self, sample_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Those of these images that could be decoded, in this order."""
        if np.array_equal(sample_N, self.sample_N):
            return sample_N, self.features_ND  # without a copy
        place_N = np.searchsorted(self.sample_N, sample_N).clip(max=len(self.sample_N) - 1)
        is_there_N = self.sample_N[place_N] == sample_N
        return sample_N[is_there_N], self.features_ND[place_N[is_there_N]]


@dataclass(frozen=True)
class Source:
    """Where features come from."""

    compute: Callable[[Tensor], Tensor]  # uint8 views (B, 3, H, W) to (B, ...), on the device
    view: Transform
    batch: int
    identity: Mapping[str, Any]  # all that the features depend on, beside the device and the images
    part: int = 1024  # images of a file
    name: str = "features"

    @classmethod
    def layer(cls, detector: NetworkDetector) -> Source:
        """The layer of a network that a detector is fitted to."""
        scoring = detector.scoring
        identity = {
            "network": fingerprint(detector.network),
            "layer": scoring.layer,
            "view": [scoring.image_size, scoring.resize],
            "precision": scoring.precision,
            "batch": scoring.batch,
        }
        return cls(detector.features_of, detector.view(), scoring.batch, identity)


def fingerprint(network: Network) -> str:
    """A digest of a network's weights, its architecture and how its input is normalised."""
    digest = hashlib.sha256(json.dumps([asdict(network.architecture), network.mean, network.std]).encode())
    for name, value in network.trunk.state_dict().items():
        digest.update(name.removeprefix("backbone.").encode())  # as of the bare network, for caches of earlier versions
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def extracted(folder: Path, setup: Setup, source: Source, shard_set: ShardSet, sample_N: NDArray[np.int64]) -> Features:
    """The features of these images: those that lie in the folder are read, the others computed and put there.

    A folder may serve several runs: its contents are keyed by the source's identity, the device and the shards. Part
    files appear atomically, and are computed in batches that do not depend on the number of processes, so that the
    features do not either. Memory: the features and one part. Called on all ranks.
    """
    own = {
        **source.identity,
        "device": setup.accelerator.device.type,
        "shards": [shard.sha256 for shard in shard_set.manifest.shards],
        "samples": len(shard_set),
    }
    place = folder / hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]
    if setup.accelerator.is_main_process:
        place.mkdir(parents=True, exist_ok=True)
        remove_unfinished(place, is_shared=True)
    setup.accelerator.wait_for_everyone()
    before = read_parts(place, with_features=False)
    missing_N = np.setdiff1d(sample_N, before.sample_N)
    missing_N = missing_N[[shard_set.key(sample) not in before.skipped for sample in missing_N.tolist()]]
    setup.accelerator.wait_for_everyone()  # all have looked before anybody writes
    parts = np.split(missing_N, range(source.part, len(missing_N), source.part)) if len(missing_N) else []
    budget = ErrorBudget(shard_set, len(sample_N))
    rank, world_size = setup.accelerator.process_index, setup.accelerator.num_processes
    name = f"{source.name} of {shard_set.manifest.dataset}"
    with Progress(len(missing_N), name, is_shown=setup.accelerator.is_main_process and bool(parts)) as progress:
        for first in range(0, len(parts), world_size):
            if first + rank < len(parts):
                compute_part(place, setup, source, shard_set, parts[first + rank], budget)
            setup.heartbeat.mark(f"computed {source.name}, part {first + rank} of {len(parts)}")
            setup.stop.leave_if_asked()
            progress.add(sum(map(len, parts[first : first + world_size])))
    setup.accelerator.wait_for_everyone()
    found = read_parts(place)
    kept, features_ND = found.of(np.sort(sample_N))
    wanted = {shard_set.key(sample) for sample in sample_N.tolist()}
    return Features(kept, features_ND, {key: why for key, why in found.skipped.items() if key in wanted})


def compute_part(
    place: Path, setup: Setup, source: Source, shard_set: ShardSet, sample_N: NDArray[np.int64], budget: ErrorBudget
) -> None:
    """Compute the features of some images, on this rank alone, and write them."""
    plan = shard_set.plan(sample_N, source.batch, shuffle=False)
    workers, mark = setup.workers, setup.heartbeat.mark
    stream = Stream(shard_set, plan, source.view, workers=workers, mark=mark)
    stream.budget = budget  # shared: two bad pictures may be too many for one part
    samples, features = [], []
    for batch in stream.batches():
        is_real_B = batch.weight_B > 0
        outputs = source.compute(batch.to(setup.accelerator.device).views["image"])
        samples.append(batch.sample_B[is_real_B.numpy()])
        features.append(outputs.cpu()[is_real_B])
    name = f"{hashlib.sha256(sample_N.tobytes()).hexdigest()[:16]}.safetensors"
    tensors = {"sample_N": torch.from_numpy(np.concatenate(samples)), "features_ND": torch.cat(features)}
    save_tensors(place / name, tensors, {"skipped": budget.skipped})


def read_parts(place: Path, *, with_features: bool = True) -> Features:
    """All that a folder holds."""
    samples: list[NDArray[np.int64]] = []
    parts: list[NDArray[np.float32]] = []
    skipped: dict[str, str] = {}
    for file in sorted(place.glob("*.safetensors")):
        tensors, about = read_tensors(file)
        samples.append(tensors["sample_N"].numpy())
        skipped |= about["skipped"]
        if with_features:
            parts.append(tensors["features_ND"].numpy())
    sample_N = np.unique(np.concatenate([np.zeros(0, np.int64), *samples]))
    features_ND = np.empty((len(sample_N), *parts[0].shape[1:]) if parts else (0, 0), np.float32)
    while parts:  # last file first: for an image in two files the first wins; each is freed
        features_ND[np.searchsorted(sample_N, samples.pop())] = parts.pop()
    return Features(sample_N, features_ND, skipped)
