"""Owns the slates of a replay: each test user's later interactions, among items that the user never rated."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST

__all__ = ["Slate", "slates"]


@dataclass(frozen=True, slots=True)
class Slate:
    """The candidates of one user."""

    user: int
    """User row."""
    items: NDArray[np.int64]
    """Item rows [C]: n later interactions, then unrated items."""
    labels: NDArray[np.float32]
    """Labels [n] of the later interactions."""


def slates(dataset: Dataset, *, size: int, seed: int) -> Iterator[Slate]:
    """One slate for every user with test samples.

    Args:
        dataset: The dataset.
        size: Number of candidates. A user with more later interactions keeps them all; a user who rated nearly all
            items gets fewer candidates.
        seed: Seed of the sampled items.
    """
    generator = np.random.default_rng(seed)
    all_items = np.arange(len(dataset.items))
    test_events = dataset.samples(TEST)
    for user in np.unique(dataset.event_user[test_events]):
        start, stop = dataset.offsets[user], dataset.offsets[user + 1]
        rated_items = dataset.event_item[start:stop].astype(np.int64)
        later_events = test_events[(test_events >= start) & (test_events < stop)]
        later_items = dataset.event_item[later_events].astype(np.int64)
        unrated_items = np.setdiff1d(all_items, rated_items)
        padding = min(max(0, size - len(later_items)), len(unrated_items))
        sampled_items = generator.choice(unrated_items, padding, replace=False)
        yield Slate(int(user), np.concatenate([later_items, sampled_items]), dataset.labels[later_events])
