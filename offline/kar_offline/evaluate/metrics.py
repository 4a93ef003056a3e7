"""Owns the metrics of click-through-rate models and their uncertainty, as pure functions of arrays.

Everywhere: `labels` [S] of 0 and 1, `scores` [S] (probabilities for `logloss`, `ece` and `reliability`), `users` [S]
any integers. Intervals resample whole users with replacement, since a user's samples are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

__all__ = [
    "Interval",
    "Pairs",
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
]

BINS: Final = 15
BLOCK_USERS: Final = 128


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


@dataclass(frozen=True, slots=True)
class Pairs:
    """All pairs of a positive and a negative, summed by the users that they belong to: AUC under any user weights."""

    won: NDArray[np.float64]
    """[U, U] pairs of row user's positives and column user's negatives that are in order, ties counted half."""
    positive: NDArray[np.float64]
    """[U] positives of each user."""
    negative: NDArray[np.float64]
    """[U] negatives of each user."""

    @staticmethod
    def of(labels: NDArray, scores: NDArray, users: NDArray) -> "Pairs":
        """Count them; users are in rising order."""
        _, user = np.unique(users, return_inverse=True)
        distinct, rank = np.unique(scores, return_inverse=True)
        count, ranks = int(user.max(initial=-1)) + 1, len(distinct)
        up = labels > 0
        positives = np.zeros((count, ranks), np.float32)
        np.add.at(positives, (user[up], rank[up]), 1)
        won = np.zeros((count, count))
        for start in range(0, count, BLOCK_USERS):
            chosen = ~up & (user >= start) & (user < start + BLOCK_USERS)
            here = np.zeros((min(BLOCK_USERS, count - start), ranks), np.float32)
            np.add.at(here, (user[chosen] - start, rank[chosen]), 1)
            below = np.cumsum(here, 1) - here / 2
            won[:, start : start + BLOCK_USERS] = positives @ below.T
        sums = (np.bincount(user[chosen], minlength=count).astype(np.float64) for chosen in (up, ~up))
        return Pairs(won, *sums)

    def auc(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """AUC [R] under each of the user weights [R, U]; NaN where a class has no weight."""
        pairs = (weights @ self.positive) * (weights @ self.negative)
        won = ((weights @ self.won) * weights).sum(1)
        return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)


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
    ours, theirs = Pairs.of(labels, scores, users), Pairs.of(labels, baseline, users)
    weights = bootstrap_weights(len(ours.positive), seed=seed, resamples=resamples)
    difference = auc(labels, scores) - auc(labels, baseline)
    return interval(difference, ours.auc(weights) - theirs.auc(weights))


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
