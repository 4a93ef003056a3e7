"""Owns paired comparisons of models: metrics of their predictions, and differences with bootstrapped intervals.

A comparison is paired: both models predict the same test rows, and both AUCs are computed on the same resamples of
users.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kar_offline.evaluate.metrics import Interval, auc, gauc, interval, logloss, resampled_auc

__all__ = ["MeanMetrics", "Predicted", "mean_difference", "means"]


class Predicted(NamedTuple):
    """The metrics of one model's predictions."""

    auc: float
    logloss: float
    gauc: float
    resampled_auc: NDArray[np.float64]
    """[R] AUC under the bootstrap's weights."""

    @staticmethod
    def of(labels: NDArray, scores: NDArray, users: NDArray, weights: NDArray[np.float64]) -> "Predicted":
        """Metrics of scores [S] for labels [S] of users [S], with the bootstrap's weights [R, U]."""
        return Predicted(
            auc(labels, scores),
            logloss(labels, scores),
            gauc(labels, scores, users),
            resampled_auc(labels, scores, users, weights),
        )


class MeanMetrics(NamedTuple):
    """Means over folds and seeds."""

    auc: float
    logloss: float
    gauc: float


def means(predicted: Sequence[Predicted]) -> MeanMetrics:
    """Mean metrics of several trainings."""
    return MeanMetrics(
        float(np.mean([metrics.auc for metrics in predicted])),
        float(np.mean([metrics.logloss for metrics in predicted])),
        float(np.mean([metrics.gauc for metrics in predicted])),
    )


def mean_difference(ours: Sequence[Predicted], theirs: Sequence[Predicted]) -> Interval:
    """Mean difference in AUC over folds and seeds, in which both sequences have the same order."""
    pairs = list(zip(ours, theirs, strict=True))
    mean = float(np.mean([our.auc - their.auc for our, their in pairs]))
    return interval(mean, np.mean([our.resampled_auc - their.resampled_auc for our, their in pairs], 0))
