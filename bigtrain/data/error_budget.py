"""Bad pictures: each named once, and the run stopped when there are too many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.plan import PADDING
from bigtrain.data.shard_set import ShardSet

log = logging.getLogger(__name__)


class ErrorBudget:
    """Names each picture that cannot be decoded, once, and stops the run when there are too many.

    Too many: `in_a_row` in succession on a rank, or more than `share` of an epoch's samples over all ranks (one is
    always allowed). With several ranks the caller passes their sum to `agree` on each.
    """

    def __init__(self, shard_set: ShardSet, samples: int, *, in_a_row: int = 100, share: float = 0.01) -> None:
        self.shard_set, self.in_a_row, self.samples = shard_set, in_a_row, samples
        self.limit = max(1, int(share * samples))
        self.skipped: dict[str, str] = {}  # key -> reason; those of this rank
        self.by_kind: Counter[str] = Counter()  # of images.KINDS
        self._row = 0
        self._epoch, self._in_epoch = 0, 0

    def count(self, sample_B: NDArray[np.int64], bad: Mapping[int, str]) -> None:
        """Name those of this rank's samples that are bad, and stop when too many come in a row."""
        for sample in sample_B[sample_B != PADDING].tolist():
            self._row = self._row + 1 if sample in bad else 0
            if sample in bad and (key := self.shard_set.key(sample)) not in self.skipped:
                self.skipped[key] = bad[sample]
                self.by_kind[bad[sample].partition(":")[0]] += 1
                log.warning("skipped %s of %s: %s", key, self.shard_set.url, bad[sample])
            if self._row >= self.in_a_row:
                raise self._stop(f"{self._row} pictures in a row")

    def agree(self, epoch: int, bad: int) -> None:
        """Count the bad pictures that all ranks found in a step, and stop when the epoch has too many."""
        if epoch != self._epoch:
            self._epoch, self._in_epoch = epoch, 0
        self._in_epoch += bad
        if self._in_epoch > self.limit:
            raise self._stop(f"{self._in_epoch} of {self.samples} pictures")

    def _stop(self, what: str) -> ValueError:
        listing = "".join(f"\n  {key}: {reason}" for key, reason in self.skipped.items())
        return ValueError(
            f"{self.shard_set.url}: {what} cannot be decoded; at most {self.limit} in an epoch, and "
            f"{self.in_a_row - 1} in a row, are skipped. Repair or remove them; this process found:{listing or ' none'}"
        )
