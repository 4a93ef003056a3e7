"""Owns the metrics of ranked lists, as pure functions of `labels` and `scores` [n, C], one list per row.

A list is ranked by falling score; ties keep their order. rel_i is the label at rank i, P the number of positives:

    AP@k   = sum_{i<=k} rel_i (rel_1 + ... + rel_i) / i  /  min(P, k)
    NDCG@k = sum_{i<=k} rel_i / log2(i + 1)  /  the same sum for the best order
    hit@k  = 1 if one of the first k labels is positive, else 0

A list without positives has NaN, because its order does not matter; means leave it out.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["average_precision", "hit", "ndcg"]


def _ranked_labels(labels: NDArray, scores: NDArray) -> NDArray[np.float64]:
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(labels > 0, order, 1).astype(np.float64)


def _nan_without_positives(values: NDArray[np.float64], labels: NDArray) -> NDArray[np.float64]:
    return np.where((labels > 0).any(1), values, np.nan)


def average_precision(labels: NDArray, scores: NDArray, k: int) -> NDArray[np.float64]:
    """AP@k of each list [n]; the mean over lists is MAP@k."""
    relevant = _ranked_labels(labels, scores)[:, :k]
    precision = relevant.cumsum(1) / np.arange(1, relevant.shape[1] + 1)
    best = np.clip(np.count_nonzero(labels > 0, axis=1), 1, k)
    return _nan_without_positives(np.einsum("nk,nk->n", relevant, precision) / best, labels)


def ndcg(labels: NDArray, scores: NDArray, k: int) -> NDArray[np.float64]:
    """NDCG@k of each list [n].

    Source: Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of IR Techniques" (TOIS 2002).
    """
    relevant = _ranked_labels(labels, scores)[:, :k]
    discount = 1 / np.log2(np.arange(2, relevant.shape[1] + 2))
    best = discount.cumsum()[np.clip((labels > 0).sum(1), 1, relevant.shape[1]) - 1]
    return _nan_without_positives((relevant * discount).sum(1) / best, labels)


def hit(labels: NDArray, scores: NDArray, k: int) -> NDArray[np.float64]:
    """1 for each list with a positive among the first k, else 0 [n]."""
    positives = np.count_nonzero(_ranked_labels(labels, scores)[:, :k], axis=1)
    return _nan_without_positives((positives > 0).astype(np.float64), labels)
