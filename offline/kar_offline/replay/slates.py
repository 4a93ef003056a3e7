"""Owns the demo's requests: for every test user, what came later hidden among films never rated."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST

__all__ = ["Slate", "slates"]


@dataclass(frozen=True, slots=True)
class Slate:
    """One user's candidates: later interactions first, then unrated items.

    `items` [C] are item rows; `labels` [n] belong to the first n candidates, the later interactions.
    """

    user: int
    items: NDArray[np.int64]
    labels: NDArray[np.float32]


def slates(dataset: Dataset, *, size: int, seed: int) -> Iterator[Slate]:
    """One slate for every user with test samples, padded with items that the user never rated to `size` candidates.

    A user with more than `size` later interactions keeps them all.
    """
    generator = np.random.default_rng(seed)
    everything = np.arange(len(dataset.items))
    test = dataset.samples(TEST)
    for user in np.unique(dataset.event_user[test]):
        begin, end = dataset.offsets[user], dataset.offsets[user + 1]
        rated = dataset.event_item[begin:end].astype(np.int64)
        later = test[(test >= begin) & (test < end)]
        shown = dataset.event_item[later].astype(np.int64)
        unrated = np.setdiff1d(everything, rated)
        missing = min(max(0, size - len(shown)), len(unrated))
        padding = generator.choice(unrated, missing, replace=False)
        yield Slate(int(user), np.concatenate([shown, padding]), dataset.labels[later])
