"""Owns the metrics of click models and their uncertainty, as pure functions of arrays.

Arguments everywhere: `labels` [S], 0 or 1; `scores` [S] of any scale, but probabilities for `logloss`, `ece` and
`reliability`; `users` [S], any integers. Intervals resample whole users with replacement, because the samples of one
user are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

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
"""Default number of bins of `reliability` and `ece`."""
BLOCK: Final = 2**21
"""Number of sample weights that `resampled_auc` holds in memory at once."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference with its bootstrapped 95 % interval."""

    mean: float
    """The difference on the samples themselves."""
    low: float
    high: float


def auc(labels: NDArray, scores: NDArray) -> float:
    """Probability that a positive scores higher than a negative; ties count half. NaN if there is one class only.

    Computed from the rank sum of the positives, as the statistic U of Mann and Whitney.

    Example:
        >>> auc(np.array([1, 1, 0, 0]), np.array([0.8, 0.3, 0.3, 0.1]))
        0.875
    """
    positive = labels > 0
    positives = int(positive.sum())
    if positives in (0, len(labels)):
        return float("nan")
    rank_sum = rankdata(scores)[positive].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))


def logloss(labels: NDArray, scores: NDArray) -> float:
    """Mean negative log-likelihood in nats. Probabilities are kept at least 1e-7 away from 0 and 1."""
    probability = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.where(labels > 0, np.log(probability), np.log1p(-probability)).mean())


def gauc(labels: NDArray, scores: NDArray, users: NDArray) -> float:
    """Mean AUC of the users with both classes, weighted by their number of samples; NaN if there is no such user.

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising" (KDD 2017, arXiv 1703.02091).
    """
    order = np.argsort(users, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(users[order])) + 1)
    with_both_classes = [group for group in groups if 0 < (labels[group] > 0).sum() < len(group)]
    if not with_both_classes:
        return float("nan")
    auc_of_user = [auc(labels[group], scores[group]) for group in with_both_classes]
    return float(np.average(auc_of_user, weights=[len(group) for group in with_both_classes]))


class Reliability(NamedTuple):
    """Bins of samples by rising score; all have about the same number of samples."""

    score: NDArray[np.float64]
    """Mean score of each bin."""
    rate: NDArray[np.float64]
    """Share of positives in each bin."""
    samples: NDArray[np.int64]
    """Number of samples in each bin."""


def reliability(labels: NDArray, scores: NDArray, *, bins: int = BINS) -> Reliability:
    """Mean score and share of positives of samples with similar scores."""
    order = np.argsort(scores, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    score, rate = ([float(values[part].mean(dtype=np.float64)) for part in parts] for values in (scores, labels > 0))
    return Reliability(np.array(score), np.array(rate), np.array([len(part) for part in parts]))


def ece(labels: NDArray, scores: NDArray, *, bins: int = BINS) -> float:
    """Expected calibration error: the mean of |score - rate| over the bins of `reliability`, weighted by samples."""
    binned = reliability(labels, scores, bins=bins)
    return float(np.average(np.abs(binned.score - binned.rate), weights=binned.samples))


def resampled_auc(
    labels: NDArray, scores: NDArray, users: NDArray, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """AUC under several weightings of the users.

    Args:
        labels: [S].
        scores: [S].
        users: [S].
        weights: [R, U], weights of the distinct users in rising order.

    Returns:
        [R]; NaN where a class has no weight.
    """
    _, user = np.unique(users, return_inverse=True)
    order = np.argsort(scores, kind="stable")
    user, positive = user[order], labels[order] > 0
    # Equal scores lie side by side and form a run; pairs within a run are ties and count half.
    run_starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    result = np.full(len(weights), np.nan)
    if not len(user):
        return result
    block = max(1, BLOCK // len(user))
    for start in range(0, len(weights), block):
        sample_weights = weights[start : start + block, user]  # [block, S]
        positives, negatives = (
            np.add.reduceat(sample_weights * in_class, run_starts, 1) for in_class in (positive, ~positive)
        )  # [block, runs] each
        negatives_below = np.cumsum(negatives, 1) - negatives / 2
        pairs = positives.sum(1) * negatives.sum(1)  # [block]
        has_pairs = pairs > 0
        won_pairs = (positives * negatives_below).sum(1)
        result[start : start + block][has_pairs] = won_pairs[has_pairs] / pairs[has_pairs]
    return result


def bootstrap_weights(users: int, *, seed: int, resamples: int = 1000) -> NDArray[np.float64]:
    """Number of times that each user is drawn in each resample [resamples, users]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(users, np.full(users, 1 / users), resamples).astype(np.float64)


def interval(difference: float, resampled: NDArray[np.float64]) -> Interval:
    """A difference with the middle 95 % of its resamples; resamples that are not finite are left out."""
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled):
        return Interval(mean=difference, low=float("nan"), high=float("nan"))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(mean=difference, low=float(low), high=float(high))


def paired_bootstrap(
    labels: NDArray, scores: NDArray, baseline: NDArray, users: NDArray, *, seed: int, resamples: int = 1000
) -> Interval:
    """AUC of `scores` minus AUC of `baseline` on the same samples; both are resampled with the same users."""
    weights = bootstrap_weights(len(np.unique(users)), seed=seed, resamples=resamples)
    resampled, resampled_baseline = (resampled_auc(labels, values, users, weights) for values in (scores, baseline))
    return interval(auc(labels, scores) - auc(labels, baseline), resampled - resampled_baseline)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for multiple comparisons, in the given order; they bound the family-wise error rate.

    Example:
        >>> holm([0.04, 0.01, 0.02])
        [0.04, 0.03, 0.04]

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (Scandinavian Journal of Statistics 1979).
    """
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[position] = largest
    return corrected
