"""Owns the knowledge affinity, offline and online: what a user's ratings of similar items say about a candidate.

For a candidate with vector v and the user's last H rated items with unit vectors v_h and ratings r_h,

    s_h = v . v_h        similarity; 0 where an item has no vector
    w_h = r_h - mean(r)  rating relative to the user's own mean over these events

The columns `STATISTICS` describe the ratings alone. Then each segment of the vectors (the space of the texts or the
collaborative one) adds the columns `SIMILARITIES`; they are 0 where the candidate or the whole history has no vector.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["AFFINITY_EVENTS", "SIMILARITIES", "STATISTICS", "TEMPERATURES", "affinity", "affinity_columns", "centred"]

AFFINITY_EVENTS: Final = 100
"""Number of last rated items that an affinity uses. Chosen on validation users."""
STATISTICS: Final = ("log_events", "mean_rating", "rating_spread")
"""log(1 + H), and mean and standard deviation of the ratings; all 0 for an empty history."""
TEMPERATURES: Final = (0.05, 0.1, 0.2)
SIMILARITIES: Final = ("linear", *(f"softmax_{t}" for t in TEMPERATURES), "positive", "nearest")
"""sum(w s) / H; sum(softmax(s / t) w) for each temperature t; sum(w+ s) / sum(w+) with w+ = max(w, 0); max(s)."""
SMALLEST_SUM: Final = 1e-6
"""Lower bound of divisors."""


def affinity_columns(segments: int) -> int:
    """Number of columns F of `affinity`, by the number of segments of the vectors."""
    return len(STATISTICS) + segments * len(SIMILARITIES)


def centred(ratings: NDArray[np.float32], is_event: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Ratings [B, H] minus their mean over the events; 0 where `is_event` [B, H] is False (padding)."""
    count = np.maximum(is_event.sum(1, keepdims=True), 1).astype(np.float32)
    mean = np.where(is_event, ratings, 0).sum(1, keepdims=True, dtype=np.float32) / count
    return np.where(is_event, ratings - mean, np.float32(0))


def affinity(
    candidates: NDArray[np.float32],
    history: NDArray[np.float32],
    ratings: NDArray[np.float32],
    is_event: NDArray[np.bool_],
    segments: Sequence[int],
) -> NDArray[np.float32]:
    """Affinity features [B, C, F] of C candidates for each of B users.

    Args:
        candidates: Vectors [B, C, V]; each segment has unit length, or is 0 where there is no vector.
        history: Vectors [B, H, V] of rated items, with segments as in `candidates`.
        ratings: Their ratings [B, H].
        is_event: Whether each position [B, H] holds an event; the other positions are padding.
        segments: Number of components of each segment; they sum to V.
    """
    count = is_event.sum(1).astype(np.float32)  # (B,)
    divisor = np.maximum(count, 1)
    weight = centred(ratings, is_event)  # (B, H)
    mean = np.where(is_event, ratings, 0).sum(1, dtype=np.float32) / divisor  # (B,)
    spread = np.sqrt(np.square(weight).sum(1) / divisor)  # (B,)
    statistics = np.stack([np.log1p(count), mean, spread], 1)  # (B, 3)
    columns = [np.repeat(statistics[:, None], candidates.shape[1], 1)]
    for start, end in pairwise(accumulate(segments, initial=0)):
        v, h = candidates[..., start:end], history[..., start:end]
        has_vector = is_event & np.any(h != 0, axis=2)  # (B, H)
        is_defined = np.any(v != 0, axis=2) & np.any(has_vector, axis=1, keepdims=True)  # (B, C)
        similarities = _similarities(v @ h.transpose(0, 2, 1), weight, has_vector)  # (B, C, 6)
        columns.append(np.where(is_defined[..., None], similarities, 0))
    return np.concatenate(columns, 2).astype(np.float32)


def _similarities(
    s: NDArray[np.float32], weight: NDArray[np.float32], has_vector: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """The columns `SIMILARITIES` (B, C, 6) from similarities s (B, C, H) and centred ratings `weight` (B, H)."""
    count = np.maximum(has_vector.sum(1), 1).astype(np.float32)[:, None]  # (B, 1)
    weight = np.where(has_vector, weight, 0)[..., None]  # (B, H, 1)
    near = np.where(has_vector[:, None], s, np.float32(-np.inf))  # (B, C, H)
    nearest = np.where(np.any(has_vector, axis=1, keepdims=True), near.max(2, initial=-np.inf), 0)  # (B, C)
    columns = [(s @ weight)[..., 0] / count]
    for temperature in TEMPERATURES:
        share = np.exp((near - nearest[..., None]) / np.float32(temperature))  # 0 for padding
        columns.append((share @ weight)[..., 0] / np.maximum(share.sum(2), SMALLEST_SUM))
    liked = np.maximum(weight, 0)
    columns.append((s @ liked)[..., 0] / np.maximum(liked.sum(1), SMALLEST_SUM))
    return np.stack([*columns, nearest], 2)
