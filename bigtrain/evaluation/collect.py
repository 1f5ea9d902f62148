"""Values for every image of a stream, collected over the ranks: each image once, in the order of the index."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.later import Arriving, on_device
from bigtrain.data.protocol import only_label
from bigtrain.data.stream import Batch, Stream

BEHIND = 2  # batches


class Kept:
    """A stream whose batches were read once and stay in memory, to be looked at many times."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.passes = stream, 0
        self._batches = list(stream.batches())

    @property
    def budget(self) -> Kept:
        return self

    def agree(self, epoch: int, bad: int) -> None:
        """Pictures that could not be decoded count once, however often the others are looked at."""
        if self.passes == 1:
            self.stream.budget.agree(epoch, bad)

    def batches(self) -> Iterator[Batch]:
        self.passes += 1
        return iter(self._batches)

    def mark(self, what: str) -> None:
        self.stream.mark(what)


def collect(
    accelerator: Accelerator, stream: Stream | Kept, functions: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Apply functions to the `image` view of every batch and gather what they give.

    Args:
        stream: unshuffled; this rank's share of it.
        functions: name -> a function of uint8 images (B, 3, H, W) giving one row an image, a score or a feature.

    Returns:
        The samples, ascending, and for each name their values in that order; the same on all ranks. Padding and
        pictures that could not be decoded (`stream.budget.skipped`) are left out.
    """
    samples: list[NDArray[np.int64]] = []
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in functions}
    under_way: deque[tuple[Batch, Arriving]] = deque()

    def learn(behind: int) -> None:
        """Read what has been computed, but of the newest batches, for which a GPU would be waited for."""
        while len(under_way) > behind:
            batch, arriving = under_way.popleft()
            gathered = arriving.read()
            real_B = (gathered["weight"] > 0).numpy()
            if accelerator.num_processes > 1:  # a stream alone has counted them itself
                stream.budget.agree(batch.position.epoch, batch.samples_in_step - int(real_B.sum()))
            samples.append(gathered["sample"].numpy()[real_B])
            for name in functions:
                values[name].append(gathered[name].double().numpy()[real_B])

    for batch in stream.batches():
        batch = batch.to(accelerator.device)
        here = {name: function(batch.views["image"]) for name, function in functions.items()}
        stream.mark(f"computed {', '.join(functions)} of batch {batch.position.batch}")
        sample_B = on_device(batch.sample_B.tolist(), accelerator.device)
        gathered = accelerator.gather({"sample": sample_B, "weight": batch.weight_B, **here})
        under_way.append((batch.without_views(), Arriving(gathered)))
        learn(BEHIND if accelerator.device.type == "cuda" else 0)
    learn(0)
    sample_N = np.concatenate(samples)
    order = np.argsort(sample_N)
    return sample_N[order], {name: np.concatenate(parts)[order] for name, parts in values.items()}


def mean_over(accelerator: Accelerator, stream: Stream, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over the images of a stream of what a function of uint8 images gives for each, (B, ...) to (...).

    Summed in float64 as the batches come, so that large tensors are not kept per image; the same on all ranks.
    """
    total: Tensor | None = None
    images = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for batch in stream.batches():
        batch = batch.to(accelerator.device)
        real_B = batch.weight_B > 0
        here = function(batch.views["image"])[real_B].double().sum(dim=0)
        stream.mark(f"computed a mean of batch {batch.position.batch}")
        in_step = accelerator.reduce(real_B.sum(), "sum")
        if accelerator.num_processes > 1:  # a stream alone has counted them itself
            stream.budget.agree(batch.position.epoch, batch.samples_in_step - int(in_step))
        total, images = here if total is None else total + here, images + in_step
    assert total is not None
    return (accelerator.reduce(total, "sum") / images).float()


def top_k(
    accelerator: Accelerator, stream: Stream, logits: Callable[[Tensor], Tensor], label_of: dict[str, int]
) -> tuple[float, float, int]:
    """Top-1 and top-5 accuracy of a classifier, and the number of images judged; the same on all ranks.

    Args:
        logits: uint8 images (B, 3, H, W) to (B, C).
        label_of: the class of each column by name.
    """

    def answers(image_B3HW: Tensor) -> Tensor:
        logits_BC = logits(image_B3HW)
        return logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices

    sample_N, found = collect(accelerator, stream, {"answers": answers})
    class_N = np.array([only_label(stream.shard_set, sample, label_of) for sample in sample_N.tolist()])
    hit_N5 = found["answers"] == class_N[:, None]
    return float(hit_N5[:, 0].mean()), float(hit_N5.any(axis=1).mean()), len(sample_N)
