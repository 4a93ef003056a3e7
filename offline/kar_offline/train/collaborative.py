"""Owns collaborative item vectors, learned from training ratings alone and cross-fitted.

Two views of the ratings r_ui of users u and items i, each a sparse matrix whose columns are brought to unit length
(with some shrinkage) and whose truncated singular value decomposition X = U S V' gives item vectors V S^p:

    taste    two rows per user, for items rated at or above and below the user's mean; entries 1 / sqrt(n_u)
    rating   one row per user; entries r_ui minus the (shrunk) mean of the item and the mean of the user

Each view is scaled to unit length, then the rating view is multiplied by `RATING_WEIGHT`; an item's vector is both
views side by side. Two items are similar if the same users like or dislike them, or rate them above expectation.

Cross-fitting, the leave-one-group-out of stacking: if the rating of a training sample contributed to the vectors, the
sample would be easier than any sample in serving. Therefore training users are dealt into groups, and the vectors of
a group are learned from the other groups. Vectors can be compared within one table only, because each decomposition
has its own rotation.
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
"""Share of the components in the taste view. This and the constants below were chosen on validation users."""
TASTE_SHRINKAGE: Final = 0.5
TASTE_POWER: Final = 0.8
RATING_SHRINKAGE: Final = 20.0
RATING_POWER: Final = 1.0
RATING_WEIGHT: Final = 0.5
ITEM_MEAN_EVENTS: Final = 5.0
"""Shrinkage of an item's mean: number of average ratings added to the item's own."""


@dataclass(frozen=True, slots=True)
class CollaborativeVectors:
    """Tables of item vectors: one for each group of training users, then one for serving, learned from all users."""

    tables: NDArray[np.float32]
    """[folds + 1, items, dim]; vectors have unit length, or are zeros if the item has no rating."""
    table_of_user: NDArray[np.int64]
    """[users], number of each user's table: the group's, or the last for users without training events."""


def collaborative_vectors(dataset: Dataset, *, dim: int, folds: int, seed: int) -> CollaborativeVectors:
    """Learn item vectors from the events of the training split.

    A training user's ratings do not influence the user's own table, and ratings of other splits influence no table.

    Args:
        dataset: The events.
        dim: Components of a vector. If there are few items, the last components of each view are zeros.
        folds: Groups of training users, at least 2.
        seed: Seed of the groups.
    """
    events = np.flatnonzero(dataset.event_split == TRAIN)
    user, item, rating = dataset.event_user[events], dataset.event_item[events], dataset.event_rating[events]
    group = np.array([int(hash_fraction(seed, entity.id) * folds) for entity in dataset.users], dtype=np.int64)
    in_training = np.bincount(user, minlength=len(group)) > 0
    shape = (len(group), len(dataset.items))
    tables = [
        _item_vectors(user[learned_from], item[learned_from], rating[learned_from].astype(np.float64), shape, dim)
        for learned_from in (group[user] != fold for fold in range(folds + 1))  # no group has the number `folds`
    ]
    return CollaborativeVectors(np.stack(tables), np.where(in_training, group, folds))


def _item_vectors(
    user: NDArray[np.integer],
    item: NDArray[np.integer],
    rating: NDArray[np.float64],
    shape: tuple[int, int],
    dim: int,
) -> NDArray[np.float32]:
    """One table [items, dim], learned from events [E]; `shape` is (users, items)."""
    users, items = shape
    count = np.maximum(np.bincount(user, minlength=users), 1)
    disliked = rating < (np.bincount(user, rating, users) / count)[user]
    taste = csr_array((1 / np.sqrt(count[user]), (user + users * disliked, item)), shape=(2 * users, items))
    residual = rating - rating.mean() if len(rating) else rating
    item_count = np.bincount(item, minlength=items) + ITEM_MEAN_EVENTS
    residual = residual - (np.bincount(item, residual, items) / item_count)[item]
    residual = residual - (np.bincount(user, residual, users) / count)[user]
    residuals = csr_array((residual, (user, item)), shape=shape)
    taste_dim = round(dim * TASTE_SHARE)
    views = (
        _unit_rows(_components(taste, TASTE_SHRINKAGE, taste_dim, TASTE_POWER)),
        _unit_rows(_components(residuals, RATING_SHRINKAGE, dim - taste_dim, RATING_POWER)) * RATING_WEIGHT,
    )
    return _unit_rows(np.concatenate(views, 1)).astype(np.float32)


def _components(matrix: csr_array, shrinkage: float, dim: int, power: float) -> NDArray[np.float64]:
    """V S^power [items, dim] of a matrix after its columns are scaled to unit length; zeros beyond its rank."""
    vectors = np.zeros((matrix.shape[1], dim))
    rank = min(dim, min(matrix.shape) - 1)
    length = np.asarray(matrix.multiply(matrix).sum(0)).ravel()
    if rank < 1 or not length.any():
        return vectors
    scaled = csr_array(matrix.multiply(1 / np.sqrt(length + shrinkage)))
    # With a fixed start, the same ratings give the same similarities (and the same bits, unless the rank is short).
    start = np.full(min(matrix.shape), min(matrix.shape) ** -0.5)
    _, values, axes = svds(scaled, k=rank, v0=start)
    vectors[:, :rank] = (axes.T * values**power)[:, ::-1]
    return vectors


def _unit_rows(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-9, vectors / np.maximum(length, 1e-9), 0)
