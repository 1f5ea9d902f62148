"""A line at the start on what a teacher sees: weights that were loaded wrongly are noticed here first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.protocol import seeded_choice
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Resized
from bigtrain.evaluation.collect import Kept, collect
from bigtrain.evaluation.feature_figures import pair_agreement
from bigtrain.models.network import Network, as_vit, build_trunk
from bigtrain.training.feature_look import first_view, pooled_tokens, second_view
from bigtrain.training.run_setup import Setup

MOST, MOST_ON_CPU, FEWEST = 256, 64, 24  # pictures; with fewer, finding the other view says nothing
CPU_FLOPS = 4e11  # that the line may cost without a GPU: some seconds
LITTLE = 0.02  # deviation of the tokens by their norm: below, they hardly differ
MARGIN = 0.05  # by which more pictures must be found than with random weights; good weights exceed them by far


def print_sanity_line(
    setup: Setup, network: Network, shard_set: ShardSet, sample_N: NDArray[np.int64], size: int
) -> None:
    """Look at a few training pictures through a ViT before a run begins, and say what is seen; called on all ranks.

    Two views are made of each picture, and it is told how many find their other one among all by nearest neighbour:
    by these weights, and by the same network with random ones, which good weights exceed by far.
    """
    if (setup.run / "checkpoints").exists() or network.report.startswith("random weights"):
        return
    on_cpu = setup.accelerator.device.type == "cpu"
    affordable = min(MOST_ON_CPU, int(CPU_FLOPS / (5 * network.flops(size)))) if on_cpu else MOST
    if min(affordable, len(sample_N)) < FEWEST:
        return
    chosen_N = seeded_choice(sample_N, affordable, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random = replace(network, trunk=as_vit(build_trunk(network.architecture), "auto")).to(network.device)
    pictures = Kept(setup.in_order(shard_set, chosen_N, Resized(size), 32))
    autocast = setup.autocast()

    @torch.no_grad()
    def deviation(image_B3HW: Tensor) -> Tensor:
        """How far the patch tokens of a picture are from their mean, by their norm: (B,)."""
        with autocast:
            tokens_BND = network.vit(network.normalise(image_B3HW))[0].tokens_BND.float()
        apart_B = (tokens_BND - tokens_BND.mean(dim=1, keepdim=True)).square().sum(dim=2).mean(dim=1).sqrt()
        return apart_B / tokens_BND.norm(dim=2).mean(dim=1).clamp(min=1e-12)

    _, found = collect(setup.accelerator, pictures, {
        "deviation": deviation,
        "first": lambda image: pooled_tokens(network, autocast, first_view(image)),
        "second": lambda image: pooled_tokens(network, autocast, second_view(image)),
        "first_random": lambda image: pooled_tokens(random, autocast, first_view(image)),
        "second_random": lambda image: pooled_tokens(random, autocast, second_view(image)),
    })  # fmt: skip
    own = float(pair_agreement(found["first"], found["second"]).mean())
    of_random = float(pair_agreement(found["first_random"], found["second_random"]).mean())
    apart = float(found["deviation"].mean())
    setup.accelerator.print(
        f"the network sees: patch tokens differ by {100 * apart:.0f} % of their norm within a picture; of "
        f"{len(chosen_N)} pictures {100 * own:.0f} % find their other view (with random weights "
        f"{100 * of_random:.0f} %)"
    )
    if own < of_random + MARGIN or apart < LITTLE:
        setup.accelerator.print(
            "  hardly better than random weights: the pictures are all alike, the network is weak, or its file is not "
            "the right one (--arch, --weights-key, --mean, --std)"
        )
