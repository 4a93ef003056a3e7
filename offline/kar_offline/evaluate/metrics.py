"""Owns the metrics of click-through-rate models, as pure functions of arrays.

Everywhere: `labels` [S] of 0 and 1, `scores` [S] (probabilities for `logloss`), `users` [S] any integers.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "auc", "gauc", "logloss", "paired_bootstrap"]

CHUNK_CELLS = 1 << 22


class Interval(TypedDict):
    """A bootstrapped difference: its mean over resamples and the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


class _Ranked:
    """Scores sorted once, so that the AUC under any sample weights takes one cumulative sum."""

    def __init__(self, labels: NDArray, scores: NDArray) -> None:
        self.order = np.argsort(scores, kind="stable")
        ranked = scores[self.order]
        self.positive = labels[self.order] > 0
        self.below = np.searchsorted(ranked, ranked, side="left")  # samples with a smaller score
        self.up_to = np.searchsorted(ranked, ranked, side="right")  # and those of equal score

    def auc(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """AUC [B] under weights [B, S]; NaN where a class has no weight."""
        weights = weights[:, self.order]
        negative = np.where(self.positive, 0.0, weights)
        seen = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(negative, axis=1)], axis=1)
        positive = np.where(self.positive, weights, 0.0)
        wins = (positive * (seen[:, self.below] + seen[:, self.up_to])).sum(1) / 2
        pairs = positive.sum(1) * seen[:, -1]
        return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def auc(labels: NDArray, scores: NDArray) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN with one class only."""
    return float(_Ranked(labels, scores).auc(np.ones((1, len(labels))))[0])


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
    chunk = max(1, CHUNK_CELLS // len(labels))
    differences = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts = generator.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=size)
        weights = counts[:, member].astype(np.float64)
        differences.append(ours.auc(weights) - theirs.auc(weights))
    joined = np.concatenate(differences)
    joined = joined[np.isfinite(joined)]
    if not len(joined):
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
    low, high = np.percentile(joined, [2.5, 97.5])
    return Interval(mean=float(joined.mean()), low=float(low), high=float(high))
