"""How well scores separate novel from known: functions of `novel_N` (bool) and `score_N` (raw, higher = more novel).

Two conventions meet in the literature, so each name says which one it is. "Out" and "tpr_novel" take novel as the
positive class, "in" and "tpr_known" take known as the positive class, with -score as its score. An image is flagged
as novel when its score is >= a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, bootstrap, norm, rankdata

from bigtrain.evaluation.intervals import (
    CHUNK_DRAWS,
    CONFIDENCE,
    FEWEST_RESAMPLES,
    MOST_DRAWS,
    Bools,
    Floats,
    Ints,
    average_precision_of_counts,
    bias_corrected_interval,
    detection_error_of_counts,
    fpr_of_counts,
    needed_for,
    newcombe_interval,
    resampled_counts,
)


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


def checked(novel_N: ArrayLike, score_N: ArrayLike) -> tuple[Bools, Floats]:
    """Return both as arrays, or say why no figure can be computed from them: a figure of 0.5 would hide the reason."""
    novel, score = np.asarray(novel_N), np.asarray(score_N)
    if novel.dtype != np.bool_:
        raise ValueError(f"novel_N is {novel.dtype}, but must be bool, True where novel: say which number means novel")
    if novel.ndim != 1 or novel.shape != score.shape:
        raise ValueError(f"novel_N is {novel.shape} and score_N {score.shape}: both need one entry for each image")
    known_count, novel_count = int((~novel).sum()), int(novel.sum())
    if not known_count or not novel_count:
        raise ValueError(
            f"there are {known_count} known and {novel_count} novel images: figures need both. "
            "Check which classes the protocol calls novel, and the split that was scored."
        )
    score = score.astype(np.float64)
    bad_count = int((~np.isfinite(score)).sum())
    if bad_count:
        first = int(np.flatnonzero(~np.isfinite(score))[0])
        raise ValueError(
            f"{bad_count} of {len(score)} scores are NaN or infinite, the first is {score[first]} at position {first}: "
            "they have no rank. Look for an overflow or a division by zero where they were computed."
        )
    if score.min() == score.max():
        raise ValueError(
            f"all {len(score)} scores are {score[0]}: constant scores rank nothing. "
            "Check that the detector was trained, and that its weights were loaded."
        )
    return novel, score


def auroc(novel_N: ArrayLike, score_N: ArrayLike) -> Estimate:
    """Share of (novel, known) pairs in which novel scores higher, a tie counting half, with DeLong's interval.

    DeLong, DeLong & Clarke-Pearson, Biometrics 1988; fast by the midranks of Sun & Xu, IEEE SPL 2014. For novel image
    i and known image j, of m and n,

        V10_i = share of known below i = (rank of i among all - rank of i among novel) / n
        V01_j = share of novel above j = 1 - (rank of j among all - rank of j among known) / m
        A = mean V10,   var A = var(V10) / m + var(V01) / n        (variances with m - 1 and n - 1)

    The interval is symmetric on the logit scale, logit A +- z sd / (A (1 - A)), so it stays within 0 .. 1. Where var A
    says nothing (A is 0 or 1, or a class has a single image) it is Newcombe's, see `newcombe_interval`.
    """
    novel, score = checked(novel_N, score_N)
    return estimate_of(*structural_components(novel, score))


def estimate_of(v10_M: Floats, v01_N: Floats) -> Estimate:
    """The mean of a statistic over pairs, with DeLong's interval; see `auroc`."""
    value = float(v10_M.mean())
    m, n = len(v10_M), len(v01_N)
    if m < 2 or n < 2 or value in (0.0, 1.0):
        return Estimate(value, *newcombe_interval(value, m, n))
    sd = np.sqrt(v10_M.var(ddof=1) / m + v01_N.var(ddof=1) / n)
    half_width = norm.ppf(0.5 + CONFIDENCE / 2) * sd / (value * (1 - value))
    logit = np.log(value / (1 - value))
    return Estimate(value, float(1 / (1 + np.exp(half_width - logit))), float(1 / (1 + np.exp(-half_width - logit))))


def structural_components(novel_N: Bools, score_N: Floats) -> tuple[Floats, Floats]:
    """Return DeLong's V10 of the novel and V01 of the known images, in their order; see `auroc`."""
    rank_N = rankdata(score_N)
    novel_rank_M, known_rank_N = rankdata(score_N[novel_N]), rankdata(score_N[~novel_N])
    v10_M = (rank_N[novel_N] - novel_rank_M) / len(known_rank_N)
    v01_N = 1 - (rank_N[~novel_N] - known_rank_N) / len(novel_rank_M)
    return v10_M, v01_N


def closed_set_accuracy(is_right_N: ArrayLike) -> Estimate:
    """Share of known images that are classified correctly (Perera & Patel 5.6), with Wilson's 95 % interval."""
    right = np.asarray(is_right_N, bool)
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(right.mean()), float(interval.low), float(interval.high))


def oscr(novel_N: ArrayLike, score_N: ArrayLike, is_right_N: ArrayLike) -> Estimate:
    """Area under the open-set classification rate curve (Dhamija, Guenther & Boult 2018), with DeLong's interval.

    Over all thresholds, the share of known images that are accepted and classified correctly against the share of novel
    ones that are accepted. As a share of pairs: a correct known image that scores below a novel one, a tie half.

    Args:
        is_right_N: whether each image is classified correctly; ignored for novel images.
    """
    novel, score = checked(novel_N, score_N)
    right = np.asarray(is_right_N, bool) & ~novel
    _, v01_N = structural_components(novel, score)
    v01_N = v01_N * right[~novel]
    if not right.any():
        return Estimate(0.0, *newcombe_interval(0.0, int(novel.sum()), len(v01_N)))
    part = novel | right
    v10_M, _ = structural_components(novel[part], score[part])
    return estimate_of(v10_M * (right.sum() / len(v01_N)), v01_N)


def explained(score_N: ArrayLike, floor_N: ArrayLike, *, seed: int = 0) -> Estimate:
    """By what share a detector's error is below the floor's, 1 - sum score / sum floor; with a bootstrap's interval.

    1 for a detector without error, 0 for one that has learnt nothing, below 0 for a worse one. On held-out known images
    it measures learning without a novel image; where it is as high on novel ones, what was learnt is not the known
    class (a student of visible patches can copy what it sees).

    Args:
        score_N: errors of the detector, >= 0.
        floor_N: those that it would have made of the same images had it learnt nothing.

    Raises:
        ValueError: an error is NaN or infinite.
    """
    score, floor = np.asarray(score_N, np.float64), np.asarray(floor_N, np.float64)
    if not (np.isfinite(score).all() and np.isfinite(floor).all()):
        raise ValueError(
            "scores of held-out or novel images are NaN or infinite: look for an overflow (--precision fp32)."
        )

    def share(score: Floats, floor: Floats, axis: int = -1) -> Floats:
        return 1 - score.sum(axis=axis) / floor.sum(axis=axis)

    value = float(share(score, floor))
    if len(score) < 2:
        return Estimate(value, value, value)
    found = bootstrap(
        (score, floor), share, paired=True, method="percentile", rng=seed,
        n_resamples=min(1000, max(FEWEST_RESAMPLES, MOST_DRAWS // len(score))),
        batch=max(1, CHUNK_DRAWS // len(score)),
    )  # fmt: skip
    low, high = found.confidence_interval
    return Estimate(value, min(float(low), value), max(float(high), value))


def aupr_in(novel_N: ArrayLike, score_N: ArrayLike) -> float:
    """Average precision with known as the positive class, scored by -score; by chance its share, the prevalence."""
    novel, score = checked(novel_N, score_N)
    return aupr_out(~novel, -score)


def aupr_out(novel_N: ArrayLike, score_N: ArrayLike) -> float:
    """Average precision with novel as the positive class."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*checked(novel_N, score_N)))


def fpr_at_tpr_novel(novel_N: ArrayLike, score_N: ArrayLike, percent: int = 95) -> float:
    """Novel is the positive class: at the highest threshold that catches 95 % of novel, the share of known flagged."""
    novel, score = checked(novel_N, score_N)
    caught = needed_for(percent, int(novel.sum()))
    threshold = np.sort(score[novel])[-caught]
    return float((score[~novel] >= threshold).mean())


def fpr_at_tpr_known(novel_N: ArrayLike, score_N: ArrayLike, percent: int = 95) -> float:
    """Known is the positive class: at the lowest threshold that accepts 95 % of known, the share of novel accepted."""
    novel, score = checked(novel_N, score_N)
    return fpr_at_tpr_novel(~novel, -score, percent)


def detection_error(novel_N: ArrayLike, score_N: ArrayLike) -> float:
    """Smallest error of any threshold, known and novel weighted alike: min_t [FPR(t) + FNR(t)] / 2, 0 .. 0.5.

    Liang, Li & Srikant, ICLR 2018. The threshold is chosen on the images that are judged, so it is a bound.
    """
    from sklearn.metrics import roc_curve

    fpr_T, tpr_T, _ = roc_curve(*checked(novel_N, score_N))
    return float((0.5 * (fpr_T + 1 - tpr_T)).min())


def summary(novel_N: ArrayLike, score_N: ArrayLike, *, seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """Return every figure with its 95 % interval.

    AUROC's interval is DeLong's. The others come from a bootstrap over images, stratified: each resample has as many
    known and novel images as the set; see `bias_corrected_interval`. They have no width where separation is perfect.
    Sets of over 20 000 images get fewer resamples, at least 200, so that it stays a matter of seconds; the number used
    is in the result.

    Returns:
        {"auroc": {"value", "low", "high"}, "aupr_in": {..., "prevalence"}, "aupr_out": {..., "prevalence"},
        "fpr_at_95_tpr_novel": {...}, "fpr_at_95_tpr_known": {...}, "detection_error": {...},
        "counts": {"known", "novel"}, "bootstrap": {"resamples", "seed"}}, all of it ready for JSON.
    """
    novel, score = checked(novel_N, score_N)
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}: an interval needs at least 2, and 1000 are usual")
    resamples = min(resamples, max(FEWEST_RESAMPLES, MOST_DRAWS // len(score)))
    chunks = list(resampled_counts(novel, score, seed, resamples))

    result: dict[str, Any] = {"auroc": auroc(novel, score)._asdict()}
    for name, figure in FIGURES.items():
        if figure.of_scores is not None and figure.of_counts is not None:
            value = figure.of_scores(novel, score)
            resampled_R = np.concatenate([figure.of_counts(*counts) for counts in chunks])
            result[name] = Estimate(value, *bias_corrected_interval(value, resampled_R))._asdict()
    result["aupr_in"]["prevalence"] = float((~novel).mean())
    result["aupr_out"]["prevalence"] = float(novel.mean())
    result["counts"] = {"known": int((~novel).sum()), "novel": int(novel.sum())}
    result["bootstrap"] = {"resamples": resamples, "seed": seed}
    return result


class Figure(NamedTuple):
    """What a figure is called, how it is read and computed; `of_counts` gives it for R resamples, for its interval."""

    heading: str
    more_is_better: bool
    meaning: str
    of_scores: Callable[[Bools, Floats], float] | None = None  # None: auroc, which has its own interval, and
    of_counts: Callable[[Ints, Ints], Floats] | None = None  # figures that only some runs have: not in the report


FIGURES = {  # the one list: summary, report, tables and recipes take names, headings and direction from it
    "auroc": Figure("AUROC", True, "share of pairs in which the novel picture scores above the known one"),
    "aupr_in": Figure(
        "AUPR-in", True, "average precision, known is the positive class",
        aupr_in,
        lambda known_RG, novel_RG: average_precision_of_counts(novel_RG[:, ::-1], known_RG[:, ::-1]),
    ),
    "aupr_out": Figure(
        "AUPR-out", True, "average precision, novel is the positive class",
        aupr_out, average_precision_of_counts,
    ),
    "fpr_at_95_tpr_novel": Figure(
        "FPR, 95\u00a0% of novel caught", False, "share of known flagged at that threshold",
        fpr_at_tpr_novel, fpr_of_counts,
    ),
    "fpr_at_95_tpr_known": Figure(
        "FPR, 95\u00a0% of known accepted", False, "share of novel accepted at that threshold",
        fpr_at_tpr_known, lambda known_RG, novel_RG: fpr_of_counts(novel_RG[:, ::-1], known_RG[:, ::-1]),
    ),
    "detection_error": Figure(
        "Detection error", False, "smallest mean of both error rates, over all thresholds",
        detection_error, detection_error_of_counts,
    ),
    "closed_set_accuracy": Figure("Closed-set accuracy", True, "share of known pictures classified correctly"),
    "oscr": Figure("OSCR", True, "area under the open-set classification rate curve"),
    "explained": Figure("Explained", True, "by what share the error is below that of a constant answer"),
    "explained_novel": Figure("Explained, novel", False, "the same on novel pictures"),
    "auroc_annotated": Figure("AUROC, annotated", True, "AUROC without pictures that show no class"),
}  # fmt: skip
IN_REPORT = {name: figure for name, figure in FIGURES.items() if figure.of_scores or name == "auroc"}
