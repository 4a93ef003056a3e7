"""Owns the metrics of click-through-rate models, as pure functions of arrays.

Everywhere: `labels` [S] of 0 and 1, `scores` [S] (probabilities for `logloss`), `users` [S] any integers.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "auc", "gauc", "logloss", "paired_bootstrap"]


class Interval(TypedDict):
    """A bootstrapped difference: its mean over resamples and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


class _Ranked:
    """Scores sorted once, so that the AUC under any sample weights takes one cumulative sum."""

    def __init__(self, labels: NDArray, scores: NDArray) -> None:
        self.positive = np.flatnonzero(labels > 0)
        negative = np.flatnonzero(labels <= 0)
        self.negative = negative[np.argsort(scores[negative])]
        ranked = scores[self.negative]
        self.below = np.searchsorted(ranked, scores[self.positive], side="left")  # negatives with a smaller score
        self.up_to = np.searchsorted(ranked, scores[self.positive], side="right")  # and those of equal score

    def auc(self, weights: NDArray[np.float64]) -> float:
        """AUC under weights [S]; NaN where a class has no weight."""
        seen = np.concatenate(([0.0], np.cumsum(weights[self.negative])))
        positive = weights[self.positive]
        pairs = positive.sum() * seen[-1]
        return float(positive @ (seen[self.below] + seen[self.up_to]) / (2 * pairs)) if pairs > 0 else float("nan")


def auc(labels: NDArray, scores: NDArray) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN with one class only."""
    return _Ranked(labels, scores).auc(np.ones(len(labels)))


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


def paired_bootstrap(
    labels: NDArray, scores: NDArray, baseline: NDArray, users: NDArray, *, seed: int, resamples: int = 1000
) -> Interval:
    """AUC of `scores` minus AUC of `baseline` on the same samples, resampling whole users with replacement.

    Both models see the same resamples; those in which a class is missing are left out.
    """
    generator = np.random.default_rng(seed)
    distinct, member = np.unique(users, return_inverse=True)
    ours, theirs = _Ranked(labels, scores), _Ranked(labels, baseline)
    even = np.full(len(distinct), 1 / len(distinct))
    differences = []
    for _ in range(resamples):
        weights = generator.multinomial(len(distinct), even)[member].astype(np.float64)
        differences.append(ours.auc(weights) - theirs.auc(weights))
    joined = np.array(differences)
    joined = joined[np.isfinite(joined)]
    if not len(joined):
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
    low, high = np.percentile(joined, [2.5, 97.5])
    return Interval(mean=float(joined.mean()), low=float(low), high=float(high))
