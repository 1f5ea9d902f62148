"""What every detector does with pictures, trained or exported: scores, maps, p-values, decisions. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.views import Transform
from bigtrain.detectors.calibration import Calibration, Judgement, Threshold
from bigtrain.detectors.pictures import Given, Unreadable, batches_of

if TYPE_CHECKING:
    from bigtrain.detectors.estimator import PictureEstimator


class ScoredViews(NamedTuple):
    """What a batch of views scored: float64, per patch float32, and the number of the class that each shows."""

    score_B: NDArray[np.float64]
    map_Bhw: NDArray[np.float32] | None = None
    class_B: NDArray[np.int64] | None = None


class PictureJudge:
    """A subclass has `view`, `score_views` and `scoring`, which has `batch` and `threshold`.

    Methods may be called from several threads at once.
    """

    scoring: Any
    calibration: Calibration = Calibration()
    class_names: tuple[str, ...] = ()  # Of the classes that it tells apart.
    map_side: int | None = None  # Of a map, in patches; None where the method has none.

    def view(self) -> Transform:
        """What is made of a picture before it is scored."""
        raise NotImplementedError

    def score_views(self, image_B3HW: NDArray[np.uint8]) -> ScoredViews:
        """Score a whole batch of views."""
        raise NotImplementedError

    def score(
        self,
        images: Iterable[Given],
        *,
        unreadable: Unreadable = "nan",
        batch: int | None = None,
        reduced: bool = True,
    ) -> NDArray[np.float64]:
        """Novelty of each image, higher = more novel: shape (B,).

        Args:
            images: pictures, or a generator of them, each as `Given`; of arrays and tensors also one with an axis more.
            unreadable: "nan": a picture that cannot be read scores NaN, and a warning names it; "raise": an error does.
            batch: images of a forward pass; None: as in the run, filled up where there are fewer, which gives the same
                bits as the run. 1 takes one picture's time for one picture; the last digits may differ.
            reduced: decode large JPEGs at a fraction of their size, as the run did. False: a file scores as its pixels
                in an array do; scores of large JPEGs move by up to some percent.

        Raises:
            ValueError: a single picture instead of several, or, with "raise", one that cannot be read.
        """
        parts = [np.zeros(0)]
        for found, is_read_b in self._score(images, unreadable, batch, reduced):
            parts.append(np.full(len(is_read_b), np.nan))
            parts[-1][is_read_b] = found.score_B
        return np.concatenate(parts)

    def score_map(self, images: Iterable[Given]) -> NDArray[np.float32] | None:
        """Novelty of each patch of each image, (B, h, w), NaN of an image that cannot be read; None where the method
        has none. How an image's score comes of it is the method's."""
        if (side := self.map_side) is None:
            return None
        maps = [np.zeros((0, side, side), np.float32)]
        for found, is_read_b in self._score(images):
            maps.append(np.full((len(is_read_b), side, side), np.nan, np.float32))
            if found.map_Bhw is not None:
                maps[-1][is_read_b] = found.map_Bhw
        return np.concatenate(maps)

    def judge(
        self,
        images: Iterable[Given],
        *,
        unreadable: Unreadable = "raise",
        batch: int | None = None,
        reduced: bool = True,
    ) -> list[Judgement]:
        """Score, p-value, decision, class and map of each image, from one pass. Arguments as of `score`."""
        judged: list[Judgement] = []
        for found, is_read_b in self._score(images, unreadable, batch, reduced):
            readable = iter(self.judgements(found))
            judged += [next(readable) if is_read else Judgement(np.nan) for is_read in is_read_b]
        return judged

    def judgements(self, found: ScoredViews, threshold: float | None = None) -> list[Judgement]:
        """What some scores say.

        Args:
            threshold: None: the detector's own.
        """
        threshold = self.scoring.threshold if threshold is None else threshold
        p_value_B = self.calibration.p_values(found.score_B)
        return [
            Judgement(
                score=float(score),
                p_value=None if np.isnan(p_value_B[i]) else float(p_value_B[i]),
                novel=None if threshold is None or not np.isfinite(score) else bool(score > threshold),
                class_name=None if found.class_B is None else self.class_names[int(found.class_B[i])],
                map_hw=None if found.map_Bhw is None else found.map_Bhw[i],
            )
            for i, score in enumerate(found.score_B)
        ]

    def as_estimator(self) -> PictureEstimator:
        """This detector under scikit-learn's names and signs, in which higher = more normal."""
        from bigtrain.detectors.estimator import PictureEstimator

        return PictureEstimator(self)

    def threshold(self, wanted: str = "") -> Threshold | None:
        """The threshold that p=0.05, false-alarms=0.02 or score=0.7 stands for; "": the detector's own, if any."""
        if wanted:
            return self.calibration.chosen(wanted)
        own = self.scoring.threshold
        return None if own is None else self.calibration.threshold(own)

    def _score(
        self, images: Iterable[Given], unreadable: Unreadable = "nan", batch: int | None = None, reduced: bool = True
    ) -> Iterator[tuple[ScoredViews, NDArray[np.bool_]]]:
        """The scores of the readable images of each batch, and which of the batch these are."""
        size = self.scoring.batch if batch is None else batch
        for image_B3HW, is_read_b in batches_of(images, self.view(), size, unreadable, reduced):
            if image_B3HW is None:
                yield ScoredViews(np.zeros(0)), is_read_b
            else:
                yield first_of(self.score_views(image_B3HW), int(is_read_b.sum())), is_read_b


def first_of(found: ScoredViews, count: int) -> ScoredViews:
    """Without what a batch was filled up with."""
    return ScoredViews(*(None if part is None else part[:count] for part in found))  # type: ignore[arg-type]
