"""How well maps find the pixels that a mask marks: AUROC, AP, F1-max, AUPRO of any number of maps in constant memory.

Maps are brought to the picture's size, bilinear, and a pixel is defective where `mask > 0`. Scores are counted in bins
of their own leading bits, BITS of float32 in the order of the numbers: within a bin two scores differ by less than 1 in
2000, and count as equal.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from bigtrain.data.schema import MASK_SUFFIX
from bigtrain.data.shard_set import ShardSet
from bigtrain.evaluation.metrics import Estimate
from bigtrain.images import UnreadableError, decode_rgb, open_image

BITS = 20
BINS = 1 << BITS
GROUPS, COARSE_BITS = 20, 6  # of pictures, for the interval; each COARSE_BITS bits of the bins together
COARSE = BINS >> COARSE_BITS
FPR_LIMIT = 0.3  # of AUPRO (Bergmann et al. 2019, MVTec AD, 5.2)
NEIGHBOURS = np.ones((3, 3), bool)  # of a region's pixels: eight


class PixelCounts:
    """Counts of the pixels of many maps at each score; those of several processes add up."""

    def __init__(self) -> None:
        self.all_3S = np.zeros((3, BINS))  # good pixels, defective ones, regions: each weighs 1, over its pixels
        self.group_G3S = np.zeros((GROUPS, 3, COARSE))
        self.regions_G = np.zeros(GROUPS)
        self.images = 0

    def add(self, map_HW: NDArray[np.floating], mask_HW: NDArray[np.bool_], number: int = 0) -> None:
        """Count one picture's pixels.

        Args:
            number: of the picture, the same in whatever process.

        Raises:
            ValueError: the mask is of another size, or a score is no number.
        """
        if map_HW.shape != mask_HW.shape:
            raise ValueError(f"a mask of {mask_HW.shape} was given for a map of {map_HW.shape}.")
        if not np.isfinite(map_HW).all():
            raise ValueError("a map has scores that are NaN or infinite: they have no rank.")
        bin_HW, group = bins_of(map_HW), number % GROUPS
        region_HW, count = ndimage.label(mask_HW, NEIGHBOURS)
        own_M, region_M = bin_HW[mask_HW], region_HW[mask_HW]
        weight_M = 1 / np.bincount(region_M, minlength=count + 1)[region_M]
        for kind, (bin_M, weights) in enumerate(((bin_HW[~mask_HW], None), (own_M, None), (own_M, weight_M))):
            self.all_3S[kind] += np.bincount(bin_M, weights, minlength=BINS)
            self.group_G3S[group, kind] += np.bincount(bin_M >> COARSE_BITS, weights, minlength=COARSE)
        self.regions_G[group] += count
        self.images += 1

    @property
    def prevalence(self) -> float:
        """The share of defective pixels: the AP of maps that say nothing, whose AUROC is 1/2 and AUPRO 0.15."""
        good, defective, _ = self.all_3S.sum(axis=1)
        return float(defective / (good + defective))

    def arrays(self) -> NDArray[np.float64]:
        """All counts as one array, which may be summed over processes."""
        return np.concatenate([self.all_3S.ravel(), self.group_G3S.ravel(), self.regions_G, [self.images]])

    def join(self, arrays: NDArray[np.float64]) -> None:
        """Add another process's `arrays`."""
        every, groups = 3 * BINS, 3 * GROUPS * COARSE
        self.all_3S += arrays[:every].reshape(3, BINS)
        self.group_G3S += arrays[every : every + groups].reshape(GROUPS, 3, COARSE)
        self.regions_G += arrays[every + groups : -1]
        self.images += int(arrays[-1])

    def figures(self) -> dict[str, float] | None:
        """None where no pixel is defective, or all are.

        auroc   share of (defective, good) pairs of pixels in which the defective one scores higher, a tie half
        ap      average precision, defective is the positive class
        f1_max  the highest F1 over all thresholds
        aupro   mean over regions of the share of the region above a threshold, against the share of good pixels
                above it, up to FPR_LIMIT; area / FPR_LIMIT
        """
        return figures_of(self.all_3S, self.regions_G.sum())

    def estimates(self) -> dict[str, Estimate] | None:
        """The figures with 95 % intervals, by a jackknife that leaves out one group of pictures after another: the
        pixels of a picture are alike, so pictures are what is drawn."""
        if (found := self.figures()) is None:
            return None
        total_3S, regions = self.group_G3S.sum(axis=0), self.regions_G.sum()
        used = [group for group in range(GROUPS) if self.group_G3S[group].any()]
        without = [figures_of(total_3S - self.group_G3S[group], regions - self.regions_G[group]) for group in used]
        kept = [each for each in without if each is not None]
        intervals: dict[str, Estimate] = {}
        for name, value in found.items():
            values = np.array([each[name] for each in kept])
            half = 1.0
            if len(values) > 1:
                half = 1.96 * float(np.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum()))
            intervals[name] = Estimate(value, max(value - half, 0.0), min(value + half, 1.0))
        return intervals


def figures_of(count_3S: NDArray[np.float64], regions: float) -> dict[str, float] | None:
    """See `PixelCounts.figures`."""
    good_S, defective_S, region_S = count_3S
    good, defective = good_S.sum(), defective_S.sum()
    if not good or not defective:
        return None
    used_S = (good_S + defective_S) > 0
    false_S, found_S, covered_S = (
        np.append(0, each[used_S][::-1].cumsum()) for each in (good_S, defective_S, region_S)
    )
    recall_S, fpr_S = found_S / defective, false_S / good
    precision_S = found_S[1:] / (found_S[1:] + false_S[1:])
    f1_S = 2 * found_S[1:] / (found_S[1:] + false_S[1:] + defective)
    return {
        "auroc": float(np.trapezoid(recall_S, fpr_S)),
        "ap": float((np.diff(recall_S) * precision_S).sum()),
        "f1_max": float(f1_S.max()),
        "aupro": area_up_to(fpr_S, covered_S / regions, FPR_LIMIT),
    }


def bins_of(map_HW: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin of each score: its leading bits, in the order of the numbers."""
    bits = (np.ascontiguousarray(map_HW, np.float32) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> (32 - BITS)).astype(np.int64)


def area_up_to(x_S: NDArray[np.float64], y_S: NDArray[np.float64], limit: float) -> float:
    """The area under a curve up to x = limit, divided by it; cut between two points where the limit falls there."""
    end = int(np.searchsorted(x_S, limit, side="right"))
    last = np.interp(limit, x_S, y_S)
    return float(np.trapezoid(np.append(y_S[:end], last), np.append(x_S[:end], limit)) / limit)


def at_size(map_hw: NDArray[np.floating], height: int, width: int) -> NDArray[np.float32]:
    """A patch map as large as its picture, bilinear between the patches' centres."""
    return np.asarray(
        Image.fromarray(np.asarray(map_hw, np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    )


def mask_of(encoded: bytes) -> NDArray[np.bool_]:
    """Where a stored mask is above 0, (H, W). Raises UnreadableError."""
    image = open_image(encoded)
    values = np.asarray(image if image.mode in ("L", "1", "I", "I;16", "P") else decode_rgb(encoded))
    is_marked = np.asarray(values > 0)
    return is_marked if values.ndim == 2 else np.asarray(is_marked.any(axis=2))


def masks_of(shard_set: ShardSet) -> dict[str, bytes]:
    """The masks in a set's tars on this machine, by key, as PNG: small beside the maps; none behind a URL."""
    found: dict[str, bytes] = {}
    folder = Path(shard_set.url, shard_set.manifest.shards_at)
    if not folder.is_dir():
        return found
    for shard in shard_set.manifest.shards:
        with tarfile.open(folder / shard.file) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(f".{MASK_SUFFIX}"):
                    data = tar.extractfile(member)
                    assert data is not None
                    found[member.name.removesuffix(f".{MASK_SUFFIX}")] = data.read()
    return found


def outline(mask_HW: NDArray[np.bool_], thickness: int = 1) -> NDArray[np.bool_]:
    """The edge of what a mask marks, (H, W), inside of it."""
    return mask_HW & ~ndimage.binary_erosion(mask_HW, NEIGHBOURS, iterations=thickness)


def pixel_counts(
    score_map: Callable[[list[bytes]], NDArray[np.float32]],
    batch: int,
    shard_set: ShardSet,
    sample_N: NDArray[np.int64],
    masks: dict[str, bytes],
    known: frozenset[str],
) -> PixelCounts:
    """Count the maps of some pictures against their masks.

    Args:
        score_map: encoded pictures to the maps of the whole of them, (B, h, w); `batch` of them at a time.
        known: classes: a picture without a mask is good if it shows one of them, and else is left out, for nobody
            says where its defect is.
    """
    counts = PixelCounts()
    for start in range(0, len(sample_N), batch):
        some = sample_N[start : start + batch].tolist()
        payloads = shard_set.read(some)
        masks_b = masks_read(payloads, some, shard_set, masks, known)
        for sample, map_hw, mask_HW in zip(some, score_map(payloads), masks_b, strict=True):
            if mask_HW is not None and np.isfinite(map_hw).all():
                counts.add(at_size(map_hw, *mask_HW.shape), mask_HW, sample)
    return counts


def masks_read(
    payloads: list[bytes], samples: list[int], shard_set: ShardSet, masks: dict[str, bytes], known: frozenset[str]
) -> Iterator[NDArray[np.bool_] | None]:
    """The mask of each picture; of a known one without a mask, nothing is marked; None where it cannot be told."""
    from bigtrain.data.decode import Picture

    for payload, sample in zip(payloads, samples, strict=True):
        try:
            if encoded := masks.get(shard_set.key(sample)):
                yield mask_of(encoded)
            elif known.isdisjoint(shard_set.classes_of(sample)):
                yield None
            else:
                picture = Picture(payload)
                yield np.zeros((picture.height, picture.width), bool)
        except UnreadableError:
            yield None
