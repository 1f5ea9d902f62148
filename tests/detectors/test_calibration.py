"""p-values and thresholds from held-out scores: by hand, by simulation, and what is refused."""

import numpy as np
import pytest

from bigtrain.detectors.calibration import Calibration, parsed

TEN = Calibration.of([5, 3, 1, 2, 4, 6, 7, 8, 9, 10], "ten")


def test_p_values_by_hand():
    """(1 + how many held-out scores are as high) / 11."""
    assert TEN.p_values([10, 10.5, 0, 5, 4.5, np.nan]) * 11 == pytest.approx([2, 1, 11, 7, 7, np.nan], nan_ok=True)
    assert np.isnan(Calibration().p_values([1.0])).all()


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("count", [99, 150, 1000])
def test_rate_is_kept(rate, count):
    """Over many calibrations, of normal pictures at most the wanted share is flagged, and hardly less."""
    rng = np.random.default_rng(0)
    given = []
    for _ in range(400):
        threshold = Calibration.of(rng.normal(size=count), "").for_rate(rate, "").value
        given.append(1 - normal_share_below(threshold))
    assert np.mean(given) <= rate + 4 * np.std(given) / 20
    assert np.mean(given) >= rate - 1 / (count + 1) - 4 * np.std(given) / 20


def normal_share_below(value):
    from scipy.stats import norm

    return norm.cdf(value)


def test_interval_holds_the_truth():
    """The interval of a threshold's false alarms holds their true share in 95 % of calibrations."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        threshold = Calibration.of(rng.normal(size=200), "").for_rate(0.05, "")
        held += threshold.low <= 1 - normal_share_below(threshold.value) <= threshold.high
    assert 930 <= held <= 970


def test_threshold_and_p_value_agree():
    """For any rate, a score is above the threshold exactly where its p-value is at most the rate."""
    rng = np.random.default_rng(2)
    calibration = Calibration.of(rng.integers(0, 30, 200), "")  # with ties
    scores = np.arange(-1, 32, 0.5)
    for rate in (0.01, 0.05, 0.29, 0.5, 0.9):
        threshold = calibration.for_rate(rate, "").value
        assert ((scores > threshold) == (calibration.p_values(scores) <= rate)).all(), rate


def test_rates_that_rounding_could_miss():
    """29 % of 100 places are 29, though 0.29 x 100 is a little less in floating point."""
    hundred = Calibration.of(np.arange(99), "")
    assert hundred.for_rate(0.29, "").value == 99 - 29
    assert hundred.for_rate(0.01, "").value == 98


def test_between_two_scores():
    """Between two held-out scores the share lies between theirs; above and below all of them it is one-sided."""
    inside, at = TEN.threshold(8.5), TEN.threshold(8)
    assert (inside.low, inside.high) == (TEN.threshold(9).low, TEN.threshold(8).high) and inside.low < at.low
    assert TEN.threshold(11).low == 0 and TEN.threshold(0).high == 1
    assert Calibration().threshold(3) == (3, None, None)


REFUSED = {
    "p=0": "a share of false alarms lies above 0 and below 1",
    "p=1": "a share of false alarms lies above 0 and below 1",
    "false-alarms=0.01": "of 1 % cannot be promised: at least 99 are needed. The smallest rate is 0.0909",
    "p=0.05": "at least 19 are needed",
    "score=0.5": r"lies outside of the scores: those of the held-out normal pictures are 1 to 10",
    "score=20": "lies outside of the scores",
    "score=nan": "is none: give p=0.05, false-alarms=0.02 or score=0.7",
    "7": "is none",
    "q=1": "is none",
}


@pytest.mark.parametrize("given", REFUSED)
def test_refused(given):
    with pytest.raises(ValueError, match=REFUSED[given]):
        TEN.chosen(given)


def test_without_held_out_scores():
    """Only a score may be given; a rate is refused, with what to do."""
    assert Calibration().chosen("score=0.7").value == 0.7
    with pytest.raises(ValueError, match="give it some with `bigtrain calibrate"):
        Calibration().chosen("p=0.05")


def test_kept_and_read():
    again = Calibration.from_record(TEN.record())
    assert again.score_N.tolist() == TEN.score_N.tolist() and again.pictures == "ten"
    assert len(Calibration.from_record(None)) == 0
    with pytest.raises(ValueError, match="must be finite"):
        Calibration.of([1, np.inf], "")
    assert parsed("false-alarms=1e-3") == ("false-alarms", 0.001)
