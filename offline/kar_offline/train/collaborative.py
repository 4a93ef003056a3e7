"""Owns collaborative item vectors: learned from training ratings alone, and cross-fitted.

Two views of the ratings r_ui of users u and items i, each a sparse matrix whose columns are brought to unit length
(with some shrinkage) and whose truncated singular value decomposition X = U S V' gives item vectors V S^p:

    taste    rows (u, +) and (u, -), 1 / sqrt(n_u) where u rated i at or above, or below, the own mean
    rating   rows u, r_ui without the means of item (shrunk) and user

Each view is scaled to unit length; a vector is both side by side, of which the second counts `RATING_WEIGHT` times.
Similar are thus items that the same users like, or dislike, and items rated above expectation by the same users.

Cross-fitting (the leave-one-group-out of stacking): a sample whose own rating took part in the vectors would look
easier in training than any will when served. So training users are dealt into groups, and each group has a table of
vectors that its users took no part in. Only similarities within one table mean anything: tables are rotated freely.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TRAIN, hash_fraction

__all__ = ["CollaborativeVectors", "collaborative_vectors"]

TASTE_SHARE: Final = 5 / 8
"""Of the components; this and the numbers below were chosen on validation users."""
TASTE_SHRINKAGE: Final = 0.5
TASTE_POWER: Final = 0.8
RATING_SHRINKAGE: Final = 20.0
RATING_POWER: Final = 1.0
RATING_WEIGHT: Final = 0.5
ITEM_MEAN_EVENTS: Final = 5.0
"""So many average ratings are added to an item's own."""


@dataclass(frozen=True, slots=True)
class CollaborativeVectors:
    """Item vectors, one table for each group of training users and a last one, learned from all, that is served."""

    tables: NDArray[np.float32]
    """[folds + 1, items, dim], each vector of unit length, or zero where an item has no rating."""
    table_of_user: NDArray[np.int64]
    """[users] the table to use for each user; the last for users without training events."""


def collaborative_vectors(dataset: Dataset, *, dim: int, folds: int, seed: int) -> CollaborativeVectors:
    """Learn item vectors from the events of the training split.

    No rating of a training user changes the table of that user, and no rating of another split changes any.

    Args:
        dataset: The events; their order and the rest of the dataset do not matter.
        dim: Components; few items leave zeros at the end of each view.
        folds: Groups of training users, at least 2.
        seed: Of the groups.
    """
    events = np.flatnonzero(dataset.event_split == TRAIN)
    user, item, rating = dataset.event_user[events], dataset.event_item[events], dataset.event_rating[events]
    group = np.array([int(hash_fraction(seed, entity.id) * folds) for entity in dataset.users], dtype=np.int64)
    trains = np.bincount(user, minlength=len(group)) > 0
    shape = (len(group), len(dataset.items))
    tables = [
        _vectors(user[chosen], item[chosen], rating[chosen].astype(np.float64), shape, dim)
        for chosen in (group[user] != fold for fold in range(folds + 1))  # no group has the number `folds`
    ]
    return CollaborativeVectors(np.stack(tables), np.where(trains, group, folds))


def _vectors(
    user: NDArray[np.integer],
    item: NDArray[np.integer],
    rating: NDArray[np.float64],
    shape: tuple[int, int],
    dim: int,
) -> NDArray[np.float32]:
    """One table [items, dim] of events [E] of `shape` (users, items)."""
    users, items = shape
    count = np.maximum(np.bincount(user, minlength=users), 1)
    disliked = rating < (np.bincount(user, rating, users) / count)[user]
    taste = csr_array((1 / np.sqrt(count[user]), (user + users * disliked, item)), shape=(2 * users, items))
    rest = rating - rating.mean() if len(rating) else rating
    rest = rest - (np.bincount(item, rest, items) / (np.bincount(item, minlength=items) + ITEM_MEAN_EVENTS))[item]
    rest = rest - (np.bincount(user, rest, users) / count)[user]
    tasted = round(dim * TASTE_SHARE)
    views = (
        _unit(_components(taste, TASTE_SHRINKAGE, tasted, TASTE_POWER)),
        _unit(_components(csr_array((rest, (user, item)), shape=shape), RATING_SHRINKAGE, dim - tasted, RATING_POWER))
        * RATING_WEIGHT,
    )
    return _unit(np.concatenate(views, 1)).astype(np.float32)


def _components(matrix: csr_array, shrinkage: float, dim: int, power: float) -> NDArray[np.float64]:
    """V S^power [items, dim] of a matrix with columns of unit length; zeros where its rank does not suffice."""
    vectors = np.zeros((matrix.shape[1], dim))
    rank = min(dim, min(matrix.shape) - 1)
    length = np.asarray(matrix.multiply(matrix).sum(0)).ravel()
    if rank < 1 or not length.any():
        return vectors
    scaled = csr_array(matrix.multiply(1 / np.sqrt(length + shrinkage)))
    # Fixed: the same ratings give the same similarities (the same bits, unless the rank is short).
    start = np.full(min(matrix.shape), min(matrix.shape) ** -0.5)
    _, values, axes = svds(scaled, k=rank, v0=start)
    vectors[:, :rank] = (axes.T * values**power)[:, ::-1]
    return vectors


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-9, vectors / np.maximum(length, 1e-9), 0)
