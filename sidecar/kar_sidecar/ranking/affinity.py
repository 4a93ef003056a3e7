"""Owns the knowledge affinity: how a user's ratings of other items speak for a candidate, offline and online.

For a candidate with vector v and the user's last H rated items with unit vectors v_h and ratings r_h,

    s_h = v . v_h        similarity, 0 where either has no vector
    w_h = r_h - mean(r)  rating relative to the user's own mean over these events

`STATISTICS` columns describe the ratings alone, then each segment of the vectors (one text or collaborative space)
gives `SIMILARITIES` columns. A segment's columns are 0 where the candidate or all of the history has no vector.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["AFFINITY_EVENTS", "SIMILARITIES", "STATISTICS", "TEMPERATURES", "affinity", "affinity_columns", "centred"]

AFFINITY_EVENTS: Final = 100
"""Rated items that an affinity looks at: the last ones before the target. Chosen on validation users."""
STATISTICS: Final = ("log_events", "mean_rating", "rating_spread")
"""log(1 + H), and mean and standard deviation of the ratings; all 0 for an empty history."""
TEMPERATURES: Final = (0.05, 0.1, 0.2)
SIMILARITIES: Final = ("linear", *(f"softmax_{t}" for t in TEMPERATURES), "positive", "nearest")
"""sum(w s) / H; sum(softmax(s / t) w) for each temperature; sum(w+ s) / sum(w+) with w+ = max(w, 0); max(s)."""
FEW: Final = 1e-6


def affinity_columns(segments: int) -> int:
    """Columns F of `affinity` for vectors of so many segments."""
    return len(STATISTICS) + segments * len(SIMILARITIES)


def centred(ratings: NDArray[np.float32], seen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Ratings [B, H] minus their mean over the events that are `seen` [B, H]; 0 elsewhere."""
    count = np.maximum(seen.sum(1, keepdims=True), 1).astype(np.float32)
    mean = np.where(seen, ratings, 0).sum(1, keepdims=True, dtype=np.float32) / count
    return np.where(seen, ratings - mean, np.float32(0))


def affinity(
    candidates: NDArray[np.float32],
    history: NDArray[np.float32],
    ratings: NDArray[np.float32],
    seen: NDArray[np.bool_],
    segments: Sequence[int],
) -> NDArray[np.float32]:
    """Affinity features [B, C, F] of C candidates for each of B users.

    Args:
        candidates: Vectors [B, C, V], each segment of unit length or, where there is none, 0.
        history: Vectors [B, H, V] of rated items.
        ratings: Their ratings [B, H].
        seen: Which of the H events there are [B, H]; the others are padding.
        segments: Components of each segment, V in sum.
    """
    count = seen.sum(1).astype(np.float32)
    at_least_one = np.maximum(count, 1)
    weight = centred(ratings, seen)  # [B, H]
    mean = np.where(seen, ratings, 0).sum(1, dtype=np.float32) / at_least_one
    spread = np.sqrt(np.square(weight).sum(1) / at_least_one)
    statistics = np.stack([np.log1p(count), mean, spread], 1)  # [B, 3]
    columns = [np.repeat(statistics[:, None], candidates.shape[1], 1)]
    for start, end in pairwise(accumulate(segments, initial=0)):
        v, h = candidates[..., start:end], history[..., start:end]
        known = seen & np.any(h != 0, axis=2)  # [B, H]
        both = np.any(v != 0, axis=2) & np.any(known, axis=1, keepdims=True)  # [B, C]
        columns.append(np.where(both[..., None], _similarities(v @ h.transpose(0, 2, 1), weight, known), 0))
    return np.concatenate(columns, 2).astype(np.float32)


def _similarities(s: NDArray[np.float32], weight: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The `SIMILARITIES` [B, C, 6] of similarities [B, C, H] to events with centred ratings [B, H]."""
    count = np.maximum(known.sum(1), 1).astype(np.float32)[:, None]  # [B, 1]
    weight = np.where(known, weight, 0)[..., None]  # [B, H, 1]
    near = np.where(known[:, None], s, np.float32(-np.inf))  # [B, C, H]
    nearest = np.where(np.any(known, axis=1, keepdims=True), near.max(2, initial=-np.inf), 0)  # [B, C]
    columns = [(s @ weight)[..., 0] / count]
    for temperature in TEMPERATURES:
        share = np.exp((near - nearest[..., None]) / np.float32(temperature))  # 0 for padding
        columns.append((share @ weight)[..., 0] / np.maximum(share.sum(2), FEW))
    liked = np.maximum(weight, 0)
    columns.append((s @ liked)[..., 0] / np.maximum(liked.sum(1), FEW))
    return np.stack([*columns, nearest], 2)
