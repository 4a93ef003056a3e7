"""Owns the metrics of click-through-rate models and their uncertainty, as pure functions of arrays.

Everywhere: `labels` [S] of 0 and 1, `scores` [S] (probabilities for `logloss`, `ece` and `reliability`), `users` [S]
any integers. Intervals resample whole users with replacement, since a user's samples are not independent.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

__all__ = [
    "Interval",
    "Reliability",
    "auc",
    "bootstrap_weights",
    "ece",
    "gauc",
    "holm",
    "interval",
    "logloss",
    "paired_bootstrap",
    "reliability",
    "resampled_auc",
]

BINS: Final = 15
BLOCK: Final = 2**21
"""Weights that resampling holds at once."""


class Interval(TypedDict):
    """A difference with the bounds of its bootstrapped 95 % interval."""

    mean: float
    low: float
    high: float


def auc(labels: NDArray, scores: NDArray) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN with one class only."""
    positive = labels > 0
    n = int(positive.sum())
    if n in (0, len(labels)):
        return float("nan")
    # Mann and Whitney: the positives' ranks, less those among themselves.
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def logloss(labels: NDArray, scores: NDArray) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.where(labels > 0, np.log(p), np.log1p(-p)).mean())


def gauc(labels: NDArray, scores: NDArray, users: NDArray) -> float:
    """Mean AUC of users weighted by their samples, over users with both classes; NaN with none.

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising" (KDD 2017, arXiv 1703.02091).
    """
    order = np.argsort(users, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(users[order])) + 1)
    mixed = [group for group in groups if 0 < (labels[group] > 0).sum() < len(group)]
    if not mixed:
        return float("nan")
    per_user = [auc(labels[group], scores[group]) for group in mixed]
    return float(np.average(per_user, weights=[len(group) for group in mixed]))


class Reliability(NamedTuple):
    """Bins of (nearly) equally many samples, by rising score."""

    score: NDArray[np.float64]
    """Mean score of each bin."""
    rate: NDArray[np.float64]
    """Share of positives of each bin."""
    samples: NDArray[np.int64]
    """How many each bin holds."""


def reliability(labels: NDArray, scores: NDArray, *, bins: int = BINS) -> Reliability:
    """How often samples of similar score are positive."""
    order = np.argsort(scores, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    score, rate = ([float(values[part].mean(dtype=np.float64)) for part in parts] for values in (scores, labels > 0))
    return Reliability(np.array(score), np.array(rate), np.array([len(part) for part in parts]))


def ece(labels: NDArray, scores: NDArray, *, bins: int = BINS) -> float:
    """Expected calibration error: mean |score - rate| over equally full bins, weighted by samples."""
    found = reliability(labels, scores, bins=bins)
    return float(np.average(np.abs(found.score - found.rate), weights=found.samples))


def resampled_auc(
    labels: NDArray, scores: NDArray, users: NDArray, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUC [R] under each of the weights [R, U] of users, in rising order; NaN where a class has no weight."""
    _, user = np.unique(users, return_inverse=True)
    order = np.argsort(scores, kind="stable")
    user, up = user[order], labels[order] > 0
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # of runs of equal scores
    found = np.full(len(weights), np.nan)
    if not len(user):
        return found
    block = max(1, BLOCK // len(user))
    for start in range(0, len(weights), block):
        rows = weights[start : start + block, user]  # [block, S]
        positive, negative = (np.add.reduceat(rows * chosen, starts, 1) for chosen in (up, ~up))
        below = np.cumsum(negative, 1) - negative / 2
        pairs = positive.sum(1) * negative.sum(1)
        mixed = pairs > 0
        found[start : start + block][mixed] = (positive * below).sum(1)[mixed] / pairs[mixed]
    return found


def bootstrap_weights(users: int, *, seed: int, resamples: int = 1000) -> NDArray[np.float64]:
    """How often each of `users` is drawn in each resample [resamples, users]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(users, np.full(users, 1 / users), resamples).astype(np.float64)


def interval(difference: float, resampled: NDArray[np.float64]) -> Interval:
    """A difference and the middle 95 % of what resampling made of it; resamples without both classes are left out."""
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return Interval(mean=difference, low=float("nan"), high=float("nan"))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(mean=difference, low=float(low), high=float(high))


def paired_bootstrap(
    labels: NDArray, scores: NDArray, baseline: NDArray, users: NDArray, *, seed: int, resamples: int = 1000
) -> Interval:
    """AUC of `scores` minus AUC of `baseline` on the same samples; both see the same resamples."""
    weights = bootstrap_weights(len(np.unique(users)), seed=seed, resamples=resamples)
    ours, theirs = (resampled_auc(labels, values, users, weights) for values in (scores, baseline))
    return interval(auc(labels, scores) - auc(labels, baseline), ours - theirs)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, in their order: the family-wise error stays below the level.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (Scandinavian Journal of Statistics 1979).
    """
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[at]))
        corrected[at] = largest
    return corrected
