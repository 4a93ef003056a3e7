"""Owns the lists that rerankers are trained and tested on: samples of a user among items that are new to that user.

A list has ten rows: a window of four consecutive samples of one user, and six items that the user has no event with.
These are drawn with equal probability from the items of training samples. Windows do not overlap; the last samples of a
user are dropped if they do not fill a window. All rows of a list have the same history, which ends before the first
event of the window. The order of the rows depends on seed and user only.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TRAIN
from kar_sidecar.errors import InputError

__all__ = ["LIST_LENGTH", "Lists", "rerank_lists"]

WINDOW: Final = 4
"""Samples in a list."""
DRAWN: Final = 6
"""Drawn items in a list."""
LIST_LENGTH: Final = WINDOW + DRAWN


@dataclass(frozen=True, slots=True)
class Lists:
    """The rows [n, 10] of n lists."""

    event: NDArray[np.int64]
    """The event before which the history ends."""
    item: NDArray[np.int64]
    """Row of the item."""
    label: NDArray[np.float32]
    """Label of the sample; 0 for a drawn item."""


def rerank_lists(dataset: Dataset, split: int, *, seed: int) -> Lists:
    """The lists of one split.

    Lists without a positive row are included: training uses them, metrics leave them out.

    Args:
        dataset: The dataset.
        split: Number of the split, such as `TEST`.
        seed: Seed of the drawn items and of the order of rows.

    Raises:
        InputError: fewer than six items have no event with a user; the text names the user.
    """
    samples = dataset.samples(split)
    users = dataset.event_user[samples]
    candidates = np.unique(dataset.event_item[dataset.samples(TRAIN)])
    lists = []
    for samples_of_user in np.split(samples, np.flatnonzero(np.diff(users)) + 1):
        windows = samples_of_user[: len(samples_of_user) // WINDOW * WINDOW].reshape(-1, WINDOW)
        if len(windows):
            lists.append(_lists_of_user(dataset, windows, candidates, seed))
    if not lists:
        empty = np.zeros((0, LIST_LENGTH), np.int64)
        return Lists(empty, empty, empty.astype(np.float32))
    return Lists(
        np.concatenate([part.event for part in lists]),
        np.concatenate([part.item for part in lists]),
        np.concatenate([part.label for part in lists]),
    )


def _lists_of_user(dataset: Dataset, windows: NDArray[np.int64], candidates: NDArray[np.integer], seed: int) -> Lists:
    """The lists of one user, from windows [n, 4] of events."""
    user = int(dataset.event_user[windows[0, 0]])
    user_id = dataset.users[user].id
    rated_items = dataset.event_item[dataset.offsets[user] : dataset.offsets[user + 1]]
    new_items = np.setdiff1d(candidates, rated_items)
    if len(new_items) < DRAWN:
        raise InputError(f"user {user_id!r} rated all items but {len(new_items)}: a list needs {DRAWN} unrated items")
    digest = hashlib.blake2b(f"{seed}:{user_id}".encode(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "little"))
    drawn = np.stack([generator.choice(new_items, DRAWN, replace=False) for _ in windows])  # [n, 6]
    order = generator.permuted(np.tile(np.arange(LIST_LENGTH), (len(windows), 1)), axis=1)  # [n, 10]
    items = np.concatenate([dataset.event_item[windows], drawn], 1).astype(np.int64)
    labels = np.concatenate([dataset.labels[windows], np.zeros((len(windows), DRAWN), np.float32)], 1)
    return Lists(
        np.repeat(windows[:, :1], LIST_LENGTH, 1),
        np.take_along_axis(items, order, 1),
        np.take_along_axis(labels, order, 1),
    )
