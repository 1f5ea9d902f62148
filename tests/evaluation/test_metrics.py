"""Each figure against a hand-worked case and scikit-learn, each interval against brute force or simulation."""

import json

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bigtrain.evaluation import metrics
from bigtrain.evaluation.intervals import (
    average_precision_of_counts,
    bias_corrected_interval,
    newcombe_interval,
    resampled_counts,
)
from bigtrain.evaluation.metrics import (
    aupr_in,
    aupr_out,
    auroc,
    closed_set_accuracy,
    detection_error,
    explained,
    fpr_at_tpr_known,
    fpr_at_tpr_novel,
    oscr,
    structural_components,
    summary,
)

FIGURES = ("auroc", "aupr_in", "aupr_out", "fpr_at_95_tpr_novel", "fpr_at_95_tpr_known", "detection_error")


def simulated(known: int, novel: int, distance: float, seed: int, levels: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw normal scores, novel ones `distance` higher; rounded to `levels` steps a unit, if any, so that many tie."""
    rng = np.random.default_rng(seed)
    novel_N = rng.permutation(np.repeat([False, True], [known, novel]))
    score_N = rng.normal(size=known + novel) + distance * novel_N
    return novel_N, np.round(score_N * levels) / levels if levels else score_N


def test_auroc_by_hand():
    # pairs (novel, known): 3 > 1, 3 > 2, 2 > 1 win, 2 = 2 ties: 3.5 of 4
    assert auroc([False, False, True, True], [1, 2, 2, 3]).value == 3.5 / 4


def test_aupr_by_hand():
    # highest first: novel, known, novel, known. Out: precision 1 at recall 1/2, 2/3 at recall 1
    novel_N, score_N = [True, False, True, False], [4, 3, 2, 1]
    assert aupr_out(novel_N, score_N) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # three known, one novel. In, lowest first: known, novel, known, known: (1 + 2/3 + 3/4) / 3
    assert aupr_in([False, True, False, False], [1, 2, 3, 4]) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_fpr_at_95_tpr_novel_by_hand():
    # 20 novel at 1 .. 20: 19 of them are >= 2; known at 0, 1.5, 2, 3: two of four are >= 2 and flagged
    novel_N = np.repeat([True, False], [20, 4])
    assert fpr_at_tpr_novel(novel_N, [*range(1, 21), 0, 1.5, 2, 3]) == 0.5


def test_fpr_at_95_tpr_known_by_hand():
    # 20 known at 1 .. 20: 19 of them are <= 19; novel at 18, 19, 19.5, 20, 30: two of five are <= 19 and accepted
    novel_N = np.repeat([False, True], [20, 5])
    assert fpr_at_tpr_known(novel_N, [*range(1, 21), 18, 19, 19.5, 20, 30]) == 0.4


def test_the_two_fpr_conventions_differ():
    # one novel image lies below all known, so catching 95 % of novel flags every known; accepting known misses only it
    novel_N = np.repeat([False, True], [10, 10])
    score_N = [*range(10, 20), 0, *range(30, 39)]
    assert fpr_at_tpr_novel(novel_N, score_N) == 1.0
    assert fpr_at_tpr_known(novel_N, score_N) == 0.1


def test_detection_error_by_hand():
    # flagging >= 2 flags one known of two and both novel: (1/2 + 0) / 2; flagging >= 4: (0 + 1/2) / 2
    assert detection_error([False, True, False, True], [1, 2, 3, 4]) == 0.25
    assert detection_error([True, False], [1, 2]) == 0.5
    assert detection_error([False, True], [1, 2]) == 0.0


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize(("known", "novel"), [(50, 50), (10, 300), (301, 7)])
def test_figures_as_sklearn(known, novel, levels):
    """The figures are those of scikit-learn, with ties and without."""
    novel_N, score_N = simulated(known, novel, 1.0, seed=3, levels=levels)
    assert auroc(novel_N, score_N).value == pytest.approx(roc_auc_score(novel_N, score_N), abs=1e-12)
    assert aupr_out(novel_N, score_N) == pytest.approx(average_precision_score(novel_N, score_N))
    assert aupr_in(novel_N, score_N) == pytest.approx(average_precision_score(~novel_N, -score_N))
    fpr_T, tpr_T, _ = roc_curve(novel_N, score_N, drop_intermediate=False)
    assert fpr_at_tpr_novel(novel_N, score_N) == pytest.approx(fpr_T[tpr_T >= 0.95 - 1e-12].min())
    fpr_T, tpr_T, _ = roc_curve(~novel_N, -score_N, drop_intermediate=False)
    assert fpr_at_tpr_known(novel_N, score_N) == pytest.approx(fpr_T[tpr_T >= 0.95 - 1e-12].min())


def test_auroc_flipped():
    """Flipped scores give one minus the AUROC, and the mirrored interval."""
    novel_N, score_N = simulated(40, 60, 0.7, seed=1, levels=4)
    value, low, high = auroc(novel_N, score_N)
    assert auroc(novel_N, -score_N) == pytest.approx((1 - value, 1 - high, 1 - low))


def test_structural_components():
    """The structural components are those of all pairs, and so is the AUROC's interval."""
    novel_N, score_N = simulated(30, 20, 0.5, seed=2, levels=2)
    novel_M, known_N = score_N[novel_N], score_N[~novel_N]
    won_MN = np.array([[(x > y) + 0.5 * (x == y) for y in known_N] for x in novel_M])
    v10_M, v01_N = structural_components(novel_N, score_N)
    assert v10_M == pytest.approx(won_MN.mean(axis=1))
    assert v01_N == pytest.approx(won_MN.mean(axis=0))

    # the interval on the logit scale, from the brute-force variance
    value = won_MN.mean()
    sd = np.sqrt(won_MN.mean(axis=1).var(ddof=1) / 20 + won_MN.mean(axis=0).var(ddof=1) / 30)
    logit_low, logit_high = np.log(value / (1 - value)) + np.array([-1.959964, 1.959964]) * sd / (value * (1 - value))
    expected = [value, 1 / (1 + np.exp(-logit_low)), 1 / (1 + np.exp(-logit_high))]
    assert auroc(novel_N, score_N) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
def test_auroc_coverage(distance):
    """The AUROC's interval holds the truth about 95 times in 100."""
    truth = norm.cdf(distance / np.sqrt(2))
    intervals = [auroc(*simulated(60, 40, distance, seed)) for seed in range(600)]
    assert 0.925 <= np.mean([low <= truth <= high for _, low, high in intervals]) <= 0.975


def test_perfect_separation():
    """Perfect separation has an interval, which narrows with more images."""
    few = auroc(np.repeat([False, True], 10), np.arange(20))
    many = auroc(np.repeat([False, True], 1000), np.arange(2000))
    assert few.value == few.high == many.value == many.high == 1
    assert 0.7 < few.low < 0.9 < 0.99 < many.low < 1
    assert auroc(np.repeat([True, False], 10), np.arange(20)) == pytest.approx((0, 0, 1 - few.low))


def test_explained_by_hand():
    """Errors of 1 + 2 where the floor makes 4 + 8 explain three quarters; the floor itself explains nothing."""
    assert explained([1, 2], [4, 8]).value == pytest.approx(0.75)
    assert explained([4, 8], [4, 8]) == (0, 0, 0)
    assert explained([5, 8], [4, 8]).value < 0
    assert explained([1], [4]) == (0.75, 0.75, 0.75)


def test_explained_coverage():
    """The interval holds the true share in about 95 of 100 draws."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        floor_N = rng.uniform(0.2, 1, 60)
        found = explained(floor_N * 0.4 + rng.normal(0, 0.1, 60), floor_N, seed=seed)
        held += found.low <= 0.6 <= found.high
    assert 180 <= held <= 199


def test_newcombe_interval():
    """Both ends of Newcombe's interval solve its equation."""
    low, high = newcombe_interval(0.8, 15, 25)
    for a in (low, high):
        spread = 1 + 19 * ((1 - a) / (2 - a) + a / (1 + a))
        assert abs(0.8 - a) == pytest.approx(1.959964 * np.sqrt(a * (1 - a) * spread / (15 * 25)), rel=1e-5)
    assert low < 0.8 < high


def test_single_novel_image():
    """A single novel image still has an interval."""
    value, low, high = auroc([False, False, False, True], [1, 2, 4, 3])
    assert value == pytest.approx(2 / 3)
    assert 0 < low < 0.4 and 0.9 < high < 1


@pytest.mark.parametrize("levels", [0, 2])
def test_bootstrap_figures(levels):
    """The bootstrap's figures of a resample are those of the images it drew."""
    novel_N, score_N = simulated(40, 30, 1.0, seed=5, levels=levels)
    [(known_RG, novel_RG)] = resampled_counts(novel_N, score_N, seed=0, resamples=8)
    figures = {name: f.of_counts(known_RG, novel_RG) for name, f in metrics.FIGURES.items() if f.of_counts}
    descending_G = np.unique(score_N)[::-1]
    for row, (known_G, novel_G) in enumerate(zip(known_RG, novel_RG, strict=True)):
        assert (known_G.sum(), novel_G.sum()) == (40, 30)
        drawn_novel_N = np.repeat([False, True], [40, 30])
        drawn_N = np.concatenate([np.repeat(descending_G, known_G), np.repeat(descending_G, novel_G)])
        expected = {
            "aupr_in": aupr_in(drawn_novel_N, drawn_N),
            "aupr_out": aupr_out(drawn_novel_N, drawn_N),
            "fpr_at_95_tpr_novel": fpr_at_tpr_novel(drawn_novel_N, drawn_N),
            "fpr_at_95_tpr_known": fpr_at_tpr_known(drawn_novel_N, drawn_N),
            "detection_error": detection_error(drawn_novel_N, drawn_N),
        }
        assert {name: values[row] for name, values in figures.items()} == pytest.approx(expected)


def test_resampled_counts():
    """Resamples draw each image once on average, and only from its own class."""
    novel_N, score_N = np.array([False, True] * 5), np.arange(10.0)
    [(known_RG, novel_RG)] = resampled_counts(novel_N, score_N, seed=0, resamples=4000)
    assert known_RG.mean(axis=0) == pytest.approx([0, 1] * 5, abs=0.06)
    assert novel_RG.mean(axis=0) == pytest.approx([1, 0] * 5, abs=0.06)


def test_bias_corrected_interval():
    """Without bias the bias-corrected interval is the plain percentiles; with bias it shifts."""
    resampled_R = np.linspace(0, 1, 1001)
    assert bias_corrected_interval(0.5, resampled_R) == pytest.approx((0.025, 0.975), abs=1e-3)
    low, high = bias_corrected_interval(0.6, resampled_R)
    assert low > 0.05 and high > 0.975


def test_summary():
    """The summary holds every figure inside its interval and is ready for JSON."""
    novel_N, score_N = simulated(200, 100, 1.0, seed=4)
    found = json.loads(json.dumps(summary(novel_N, score_N, seed=1, resamples=200)))
    assert set(found) == {*FIGURES, "counts", "bootstrap"}
    for name in FIGURES:
        assert 0 <= found[name]["low"] < found[name]["value"] < found[name]["high"] <= 1
    assert found["aupr_in"]["prevalence"] == pytest.approx(2 / 3)
    assert found["aupr_out"]["prevalence"] == pytest.approx(1 / 3)
    assert found["counts"] == {"known": 200, "novel": 100}
    assert found["bootstrap"] == {"resamples": 200, "seed": 1}


def test_summary_seed():
    """The summary of the same scores depends on the seed alone."""
    novel_N, score_N = simulated(60, 50, 1.0, seed=4)
    assert summary(novel_N, score_N, seed=1) == summary(novel_N, score_N, seed=1)
    assert summary(novel_N, score_N, seed=1) != summary(novel_N, score_N, seed=2)


def test_aupr_coverage():
    """The bootstrap interval of AUPR holds the truth most times."""
    truth = aupr_out(*simulated(200_000, 200_000, 1.0, seed=0))
    held = 0
    for seed in range(150):
        interval = summary(*simulated(80, 80, 1.0, seed), resamples=200)["aupr_out"]
        held += interval["low"] <= truth <= interval["high"]
    assert 0.88 <= held / 150 <= 0.99


def test_fewer_resamples():
    """Large sets get fewer resamples, and the summary says so."""
    found = summary(*simulated(30_000, 20_000, 1.0, seed=0), resamples=1000)
    assert found["bootstrap"]["resamples"] == 400


@pytest.mark.parametrize(
    ("novel_N", "score_N", "message"),
    [
        ([False, True], [1.0, 1.0], "constant scores rank nothing"),
        (
            [False, True, True],
            [1.0, np.nan, np.inf],
            "2 of 3 scores are NaN or infinite, the first is nan at position 1",
        ),
        ([True, True], [1.0, 2.0], "there are 0 known and 2 novel images"),
        ([False, False], [1.0, 2.0], "there are 2 known and 0 novel images"),
        ([False, True], [1.0, 2.0, 3.0], r"novel_N is \(2,\) and score_N \(3,\)"),
        ([0, 1], [1.0, 2.0], "must be bool"),
    ],
)
def test_scores_refused(novel_N, score_N, message):
    """Scores that cannot be ranked are an error, not a 0.5, for every figure."""
    for figure in (auroc, aupr_in, aupr_out, fpr_at_tpr_novel, fpr_at_tpr_known, detection_error, summary):
        with pytest.raises(ValueError, match=message):
            figure(novel_N, score_N)


def test_score_dtypes():
    """Integer and float32 scores rank like each other, as float64 would."""
    novel_N, score_N = simulated(30, 30, 1.0, seed=6, levels=4)
    assert auroc(novel_N, (4 * score_N).astype(np.int32)) == auroc(novel_N, score_N.astype(np.float32))


def test_wilson_interval():
    """Closed-set accuracy has Wilson's interval."""
    found = closed_set_accuracy([True] * 8 + [False] * 2)
    z, n, share = 1.959964, 10, 0.8
    centre, half = (
        (share + z**2 / 2 / n) / (1 + z**2 / n),
        z * np.sqrt(share * 0.2 / n + (z / 2 / n) ** 2) / (1 + z**2 / n),
    )
    assert found == pytest.approx((0.8, centre - half, centre + half), abs=1e-6)


def test_oscr_area():
    """OSCR is the area under known images accepted and right against novel images accepted."""
    rng = np.random.default_rng(0)
    novel_N = rng.random(200) < 0.4
    score_N = rng.normal(size=200).round(1) + novel_N
    is_right_N = rng.random(200) < 0.7
    thresholds = [-np.inf, *np.unique(score_N)]
    accepted_novel = [(score_N[novel_N] <= t).mean() for t in thresholds]
    accepted_right = [((score_N <= t) & is_right_N)[~novel_N].mean() for t in thresholds]
    found = oscr(novel_N, score_N, is_right_N)
    assert found.value == pytest.approx(np.trapezoid(accepted_right, accepted_novel))
    assert found.low < found.value < found.high


def test_oscr_extremes():
    """OSCR is the AUROC where all are right and zero where none is."""
    rng = np.random.default_rng(0)
    novel_N, score_N = np.arange(60) % 2 == 0, rng.normal(size=60)
    assert oscr(novel_N, score_N, np.ones(60, bool)) == auroc(novel_N, score_N)
    assert oscr(novel_N, score_N, np.zeros(60, bool)).value == 0


def test_delong_interval():
    """DeLong, 3 of 4 pairs won: V10 is 1/2, 1, V01 is 1, 1/2, variances 1/8, sd = sqrt(1/16 + 1/16)."""
    logit, half_width = np.log(3), 1.959964 * np.sqrt(1 / 8) / (3 / 16)
    expected = [0.75, 1 / (1 + np.exp(half_width - logit)), 1 / (1 + np.exp(-half_width - logit))]
    assert auroc([False, True, False, True], [1, 2, 3, 4]) == pytest.approx(expected)


def test_value_outside_its_resamples():
    """A value below both of 2 resamples counts as below 3 of 4: z0 = -0.6745, and Phi(2 z0 + 1.96) = 0.7294."""
    assert bias_corrected_interval(0.0, np.array([1.0, 3.0])) == pytest.approx((0, 1 + 2 * 0.7294), abs=1e-4)
    assert bias_corrected_interval(4.0, np.array([1.0, 3.0])) == pytest.approx((3 - 2 * 0.7294, 4), abs=1e-4)


def test_one_resample_is_refused():
    """One resample gives no interval and is refused; two are enough."""
    with pytest.raises(ValueError, match="resamples is 1: an interval needs at least 2"):
        summary([False, True, True], [1, 2, 3], resamples=1)
    assert summary([False, True, True], [1, 2, 3], resamples=2)["bootstrap"]["resamples"] == 2


def test_average_precision():
    """Positives at the lowest score count too: half at precision 1/2, half at 2/4; doubled counts are no change."""
    negative_RG, positive_RG = np.array([[1, 1, 0], [2, 2, 0]]), np.array([[1, 0, 1], [2, 0, 2]])
    assert average_precision_of_counts(negative_RG, positive_RG).tolist() == [0.5, 0.5]
