"""What extreme value signatures cost beside the network whose features they are on, and beside bare operations.

    OMP_NUM_THREADS=1 python tests/benchmarks/signatures.py [--classes 1000] [--rounds 5]

A VGG16 at 224 pixels gives its 4096 features of fc7 (random weights: the cost is the same); ratios are medians (least
.. most) over rounds, in which all are timed in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bigtrain.detectors.feature_detector import checked
from bigtrain.methods.signatures.detector import Signatures
from bigtrain.methods.signatures.equations import signature_novelty
from bigtrain.models.load_network import load_network

BATCH = 16
REPEATS = 20  # of what is short


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - began) / repeats


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    trunk = load_network("vgg16", pretrained=False).trunk
    image_B3HW = torch.randn(BATCH, 3, 224, 224)
    features_BD = trunk(image_B3HW)
    class_B = torch.randint(options.classes, (BATCH,))
    sum_CD = torch.zeros(options.classes, features_BD.shape[1], dtype=torch.float64)
    fitted = Signatures().from_means(torch.rand(options.classes, features_BD.shape[1]).double().numpy())
    signature_CD, count = torch.from_numpy(fitted.signature_CD_), fitted.count_

    def fit() -> None:
        double_BD = features_BD.double()
        checked(double_BD.numpy())
        sum_CD.index_add_(0, class_B, double_BD)

    def score() -> torch.Tensor:
        return signature_novelty(features_BD, signature_CD, count)

    def bare() -> torch.Tensor:
        features_BD.topk(count, dim=1)
        return features_BD @ signature_CD.T

    contenders = {
        "forward": (lambda: trunk(image_B3HW), 1),
        "fit": (fit, REPEATS),
        "score": (score, REPEATS),
        "bare": (bare, REPEATS),
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):
        for name, (function, repeats) in contenders.items():
            took = seconds(function, repeats)
            if number:  # the first warms up
                taken[name].append(took)

    def ratio(over: list[float], under: list[float]) -> str:
        ratios = [a / b for a, b in zip(over, under, strict=True)]
        return f"{statistics.median(ratios):.4f} ({min(ratios):.4f} .. {max(ratios):.4f})"

    for name, times in taken.items():
        print(f"{name:8} {1000 * statistics.median(times) / BATCH:9.4f} ms an image")
    both = [a + b for a, b in zip(taken["fit"], taken["score"], strict=True)]
    print(f"fit and score / forward pass              {ratio(both, taken['forward'])}")
    print(f"speed of score / matrix product and top-k {ratio(taken['bare'], taken['score'])}")


if __name__ == "__main__":
    main()
