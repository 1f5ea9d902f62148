"""What scores of held-out normal pictures allow to say: p-values, thresholds, and the false alarms that these promise.

All of it rests on one assumption: the pictures to come are like the held-out ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Kind = Literal["p", "score", "false-alarms"]
KINDS: tuple[Kind, ...] = ("p", "score", "false-alarms")
SOON = 1e-9  # of a number of pictures: rounding, not a picture


class Threshold(NamedTuple):
    """Scores above `value` are novel; of normal pictures a share within `low` .. `high` is expected to be (95 %)."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Calibration:
    """The scores of n held-out normal pictures, ascending, and where they come from; n may be 0."""

    score_N: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    pictures: str = ""

    @classmethod
    def of(cls, score_N: ArrayLike, pictures: str) -> Calibration:
        score = np.sort(np.asarray(score_N, np.float64))
        if not np.isfinite(score).all():
            raise ValueError("held-out scores must be finite: look for an overflow in the network (--precision fp32).")
        return cls(score, pictures)

    def __len__(self) -> int:
        return len(self.score_N)

    def record(self) -> dict[str, Any]:
        """As detector.json keeps it."""
        return {"held_out_scores": self.score_N.tolist(), "pictures": self.pictures}

    @classmethod
    def from_record(cls, record: Mapping[str, Any] | None) -> Calibration:
        """Of a detector from before calibrations were kept, none. Raises ValueError, TypeError or KeyError."""
        return cls.of(record["held_out_scores"], str(record["pictures"])) if record else cls()

    def p_values(self, score_B: ArrayLike) -> NDArray[np.float64]:
        """The conformal p-value of each score (Vovk et al. 2005; Bates et al. 2023, eq. 3), NaN where there is none.

            p(s) = (1 + #{held-out >= s}) / (n + 1)

        Of normal pictures at most a share a has p <= a, for any a and any n.
        """
        score = np.asarray(score_B, np.float64)
        if not len(self):
            return np.full(score.shape, np.nan)
        as_high = len(self) - np.searchsorted(self.score_N, score, side="left")
        return np.where(np.isnan(score), np.nan, (1 + as_high) / (len(self) + 1))

    def for_rate(self, rate: float, said: str) -> Threshold:
        """The lowest threshold that flags at most a share `rate` of normal pictures: above it lie exactly those scores
        whose p-value is at most `rate`.

        Args:
            said: what the user gave, for the message.

        Raises:
            ValueError: so few held-out pictures cannot promise such a rate.
        """
        self.check_any(said)
        if not 0 < rate < 1:
            raise ValueError(f"{said}: a share of false alarms lies above 0 and below 1; give 0.05, say.")
        place = min(math.floor(rate * (len(self) + 1) + SOON), len(self))  # it is one of the `place` highest
        if not place:
            raise ValueError(
                f"{said}: with {len(self)} held-out pictures a rate of {100 * rate:g} % cannot be promised: at least "
                f"{math.ceil(1 / rate - SOON) - 1} are needed. The smallest rate is {1 / (len(self) + 1):.3g}; "
                "`bigtrain calibrate` takes more normal pictures."
            )
        return self.threshold(float(self.score_N[-place]))

    def threshold(self, value: float) -> Threshold:
        """A threshold with the false alarms that it gives. For one of the held-out scores with k as high, the share is
        distributed as Beta(k, n + 1 - k); between two of them it lies between theirs."""
        if not len(self):
            return Threshold(value)
        from scipy.stats import beta  # here, for it takes a second

        at, above = (len(self) - int(np.searchsorted(self.score_N, value, side=side)) for side in ("left", "right"))
        below, beyond = above + 1, above if at == above else above + 1  # the held-out scores that enclose it, or itself
        low = float(beta.ppf(0.025, beyond, len(self) + 1 - beyond)) if beyond else 0.0
        high = float(beta.ppf(0.975, below, len(self) + 1 - below)) if below <= len(self) else 1.0
        return Threshold(value, low, high)

    def check_any(self, said: str) -> None:
        if not len(self):
            raise ValueError(
                f"{said}: the detector keeps no scores of held-out pictures, so nothing can be promised: give it some "
                "with `bigtrain calibrate --detector RUN --normal DIR`, or give score=VALUE."
            )

    def chosen(self, text: str) -> Threshold:
        """The threshold that p=0.05, false-alarms=0.02 or score=0.7 stands for.

        Raises:
            ValueError: it stands for none, or for one that tells nothing apart.
        """
        kind, value = parsed(text)
        said = f"--threshold {text}"
        if kind != "score":
            return self.for_rate(value, said)
        if len(self):
            low, high = float(self.score_N[0]), float(self.score_N[-1])
            if value < low or (high > low and value > high + (high - low)):
                raise ValueError(
                    f"{said} lies outside of the scores: those of the held-out normal pictures are {low:.6g} to "
                    f"{high:.6g}. Below them every picture would be novel, and so far above them nothing tells how "
                    "many novel ones would be missed. Give one near them, or false-alarms=RATE."
                )
        return self.threshold(value)


def parsed(text: str) -> tuple[Kind, float]:
    """Of "p=0.05". Raises ValueError."""
    kind, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in KINDS or not math.isfinite(value):
        raise ValueError(f"--threshold {text!r} is none: give p=0.05, false-alarms=0.02 or score=0.7.")
    return kind, value


class Judgement(NamedTuple):
    """What a detector says of one picture."""

    score: float  # Novelty: higher = more novel, raw; NaN of a picture that cannot be read.
    p_value: float | None = None  # None: the detector keeps no held-out scores.
    novel: bool | None = None  # None: it has no threshold.
    class_name: str | None = None  # None: it tells no classes apart.
    map_hw: NDArray[np.float32] | None = None  # None: it has no map.
