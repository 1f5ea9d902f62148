"""What features are worth without a task, and with labels where there are some: rank, spread, agreement, neighbours."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from bigtrain.evaluation.intervals import share_interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NEIGHBOURS = 10


def effective_rank(features_ND: Floats) -> float:
    """How many dimensions features use: RankMe (Garrido et al. 2023, eq. 1) of centred features, from 1 to min(N, D).

        exp( - sum_k p_k ln p_k ),  p_k = s_k / sum_j s_j,  s the singular values

    1: all differ along one line; 0 stands for features that do not differ at all.
    """
    s = np.linalg.svd(features_ND - features_ND.mean(axis=0), compute_uv=False)
    if s.sum() <= 1e-9 * max(1.0, float(np.abs(features_ND).max())):
        return 0.0
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def spread(features_ND: Floats) -> float:
    """Entropy up to a constant: mean ln of each feature's distance to its nearest other, on the unit sphere (the
    estimator of Kozachenko & Leonenko 1987, as in Sablayrolles et al. 2019); it falls when features crowd."""
    cosine_NN = _cosines(features_ND, features_ND)
    np.fill_diagonal(cosine_NN, -1)
    return float(np.log(np.sqrt(np.maximum(2 - 2 * cosine_NN.max(axis=1), 0)) + 1e-8).mean())


def pair_agreement(first_ND: Floats, second_ND: Floats) -> Floats:
    """Of each picture whether, among the second views of all pictures, its own is nearest to its first: 0 or 1, (N,).
    Chance is 1 / N; ties count as misses."""
    cosine_NN = _cosines(first_ND, second_ND)
    own_N = cosine_NN.diagonal().copy()
    np.fill_diagonal(cosine_NN, -np.inf)
    return (own_N > cosine_NN.max(axis=1, initial=-np.inf)).astype(float)


def neighbours_right(features_ND: Floats, class_N: Ints, neighbours: int = NEIGHBOURS) -> Floats:
    """Of each picture whether its nearest others vote for its class, weighted by cosine: 0 or 1, (N,)."""
    cosine_NN = _cosines(features_ND, features_ND)
    np.fill_diagonal(cosine_NN, -np.inf)
    k = min(neighbours, len(class_N) - 1)
    near_NK = np.argsort(-cosine_NN, axis=1, kind="stable")[:, :k]
    votes_NC = np.zeros((len(class_N), int(class_N.max()) + 1))
    weight_NK = np.exp(np.take_along_axis(cosine_NN, near_NK, axis=1) / 0.07)  # as in Wu et al. 2018
    np.add.at(votes_NC, (np.arange(len(class_N))[:, None], class_N[near_NK]), weight_NK)
    return (votes_NC.argmax(axis=1) == class_N).astype(float)


def probe_right(features_ND: Floats, class_N: Ints) -> Floats:
    """Of each picture whether a linear classifier, trained on the other half of the pictures, tells its class; halves
    have every second picture of each class."""
    from sklearn.linear_model import LogisticRegression  # here, for it takes a second
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    half_N = np.zeros(len(class_N), bool)
    half_N[np.argsort(class_N, kind="stable")[::2]] = True
    right_N = np.zeros(len(class_N))
    for trained_N in (half_N, ~half_N):
        if len(set(class_N[trained_N].tolist())) < 2:
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        with warnings.catch_warnings(action="ignore"):  # of many classes with few pictures
            probe.fit(features_ND[trained_N], class_N[trained_N])
        right_N[~trained_N] = probe.predict(features_ND[~trained_N]) == class_N[~trained_N]
    return right_N


def prototype_usage(assignment_NK: Floats) -> float:
    """The share of K prototypes that is in use: exp of the entropy of the mean assignment, by K; 1 / K to 1."""
    p = assignment_NK.mean(axis=0)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()) / assignment_NK.shape[1])


def share(right_N: Floats) -> dict[str, float]:
    """A share of pictures with its 95 % interval."""
    low, high = share_interval(int(right_N.sum()), len(right_N))
    return {"value": float(right_N.mean()), "low": low, "high": high}


def _cosines(first_ND: Floats, second_MD: Floats) -> Floats:
    first_ND, second_MD = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (first_ND, second_MD)
    )
    return np.asarray(first_ND @ second_MD.T)
