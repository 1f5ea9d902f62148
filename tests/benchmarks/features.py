"""kNN, linear probe and rank of several networks' mean patch tokens on the same labelled pictures, beside the first's.

    python tests/benchmarks/features.py SHARDS given.safetensors tuned.safetensors --image-size 112 --images 1000

Differences are paired over the pictures, with 95 % intervals of a bootstrap.
"""

import argparse
from contextlib import nullcontext

import numpy as np
import torch

from bigtrain.data.decode import Picture
from bigtrain.data.protocol import seeded_choice
from bigtrain.data.shard_set import ShardSet
from bigtrain.data.views import Resized
from bigtrain.evaluation.feature_figures import effective_rank, neighbours_right, probe_right, share
from bigtrain.models.load_network import load_network
from bigtrain.training.feature_look import classes_of, pooled_tokens

BATCH, RESAMPLES = 50, 2000


def in_percent(low, middle, high):
    return f"{100 * middle:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards")
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--random", nargs="*", default=[], help="timm names, with random weights: the floor")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shards, rng = ShardSet(options.shards), np.random.default_rng(options.seed)
    sample_N = seeded_choice(np.arange(len(shards)), options.images, options.seed)
    class_of = classes_of(shards, sample_N)
    class_N = np.array([class_of[sample] for sample in sample_N.tolist()])
    view = Resized(options.image_size)
    views = [torch.from_numpy(view(Picture(payload), rng)["image"]) for payload in shards.read(sample_N.tolist())]
    print("| network | kNN, % | linear probe, % | effective rank | change of kNN | of the probe |")
    print("|---|---|---|---|---|---|")
    first = None
    torch.manual_seed(options.seed)
    for source in [*options.networks, *options.random]:
        network = load_network(source, pretrained=source not in options.random)
        batches = torch.stack(views).split(BATCH)
        features_ND = torch.cat([pooled_tokens(network, nullcontext(), batch) for batch in batches]).double().numpy()
        right = neighbours_right(features_ND, class_N), probe_right(features_ND, class_N)
        first = first or right
        cells = [source, *(in_percent(s["low"], s["value"], s["high"]) for s in map(share, right))]
        cells.append(f"{effective_rank(features_ND):.0f}")
        for now_N, then_N in zip(right, first, strict=True):
            drawn = rng.choice(now_N - then_N, (RESAMPLES, len(now_N))).mean(axis=1)
            low, high = np.quantile(drawn, [0.025, 0.975])
            cells.append(in_percent(low, (now_N - then_N).mean(), high) if now_N is not then_N else "")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
