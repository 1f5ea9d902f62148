"""Extreme value signatures: Schultheiss et al., "Finding the Unknown: Novelty Detection with Extreme Value Signatures
of Deep Neural Activations", GCPR 2017.

    accelerate launch recipes/signatures.py --train data/train --test data/test --known cat dog --out runs/pets

Nothing is trained: one pass over the known images adds up each class's activations of a layer; a class is the set of
its strongest dimensions, and novelty is what no class's set shares with an image's own strongest. Implemented:
signatures of 10 % of a layer (fc7 of VGG16 by default), three ways to measure the overlap, of which the texts at hand
name none, and the page of what classes share. Figures: recipes/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bigtrain.choices import Chosen, Overlap, setting
from bigtrain.data.protocol import Split, labels_of, seeded_choice
from bigtrain.training.mixins import DataMixin, JudgeMixin, NetworkMixin, RunMixin, check_network
from bigtrain.training.read_split import read_split
from bigtrain.training.run import Recipe, Result, run_recipe

if TYPE_CHECKING:  # what needs torch is imported where it is used
    import numpy as np
    from numpy.typing import NDArray

    from bigtrain.detectors.network_detector import NetworkDetector
    from bigtrain.training.run_setup import Setup


@dataclass(frozen=True)
class Config(RunMixin, JudgeMixin, NetworkMixin, DataMixin):
    layer: str = ""
    """The layer whose activations are taken, by torch's name; empty: what the classifier would see (fc7 of VGG16)."""
    share: float = setting(0.1, 1e-6, 1 - 1e-6)  # Share of the dimensions that make a signature.
    overlap: Overlap = "share"
    """How much of a signature an image has: the share of its dimensions, that weighted by their mean activation, or the
    cosine between the image's activations and the signature."""


def load(config: Config, split: Split, precision: Chosen) -> NetworkDetector:
    from bigtrain.methods.signatures.detector import Signatures
    from bigtrain.training.trunk import network_detector, read_network

    empty = Signatures(config.share, config.overlap)
    return network_detector(read_network(config), empty, config, precision, layer=config.layer)


def signatures(config: Config, setup: Setup, split: Split, extractor: NetworkDetector) -> Result:
    """Fit the signatures from each class's mean activations, then judge them."""
    from bigtrain.detectors.classical.nearest import pixel_features
    from bigtrain.detectors.network_detector import NetworkDetector
    from bigtrain.methods.signatures.detector import Signatures
    from bigtrain.methods.signatures.page import write_signatures
    from bigtrain.training.judging import judged

    extractor.network.to(setup.accelerator.device)
    layer = config.layer or "before the classifier"
    setup.announce(f"signatures: {split}; {extractor.network.described}, layer {layer}")
    known = split.protocol.known
    mean_CD = class_means(config, setup, split, extractor)
    fitted = Signatures(config.share, config.overlap).from_means(mean_CD, list(known))
    detector = NetworkDetector(extractor.network, fitted, extractor.scoring)
    plain = {"pixels": pixel_features, "the same features": detector.outputs}
    result = judged(config, setup, split, detector, method="extreme value signatures", plain=plain)
    bank_N = seeded_choice(split.fitted_N, config.neighbours_bank, config.seed)
    images = setup.in_order(split.train, bank_N, detector.view(), config.score_batch)
    write_signatures(setup.run / "signatures.html", setup.accelerator, fitted, images, detector.outputs)
    return result


def class_means(config: Config, setup: Setup, split: Split, extractor: NetworkDetector) -> NDArray[np.float64]:
    """The mean features of each known class, (C, D), from one pass over its images, shared among the processes."""
    import torch

    from bigtrain.detectors.feature_detector import checked
    from bigtrain.training.trunk import class_numbers

    device, label_of = setup.accelerator.device, labels_of(split.protocol.known)
    stream = setup.in_order(split.train, split.fitted_N, extractor.view(), config.score_batch)
    sum_CD = torch.zeros(0)
    count_C = torch.zeros(len(label_of), dtype=torch.float64, device=device)
    for batch in stream.batches():
        batch = batch.to(device)
        features_BD = extractor.outputs(batch.views["image"]).double()
        checked(features_BD.cpu().numpy())
        if not sum_CD.numel():
            sum_CD = torch.zeros(len(label_of), features_BD.shape[1], dtype=torch.float64, device=device)
        class_B, weight_B = class_numbers(split.train, batch, label_of), batch.weight_B.double()
        sum_CD.index_add_(0, class_B, features_BD * weight_B[:, None])
        count_C.index_add_(0, class_B, weight_B)
    sum_CD, count_C = setup.accelerator.reduce((sum_CD, count_C), reduction="sum")
    if setup.accelerator.num_processes > 1:
        stream.budget.agree(0, len(split.fitted_N) - int(count_C.sum()))
    if bool((count_C == 0).any()):
        empty = [name for name, count in zip(split.protocol.known, count_C.tolist(), strict=True) if not count]
        raise ValueError(f"no image of {', '.join(empty[:10])} could be decoded: nothing is known of it.")
    return (sum_CD / count_C[:, None]).cpu().numpy()


read = partial(read_split, single_labels=True)
main = partial(run_recipe, Recipe("signatures", Config, __doc__ or "", check_network, read, load, signatures))

if __name__ == "__main__":
    main()
