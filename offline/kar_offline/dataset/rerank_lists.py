"""Owns the lists that rerankers learn from and are measured on: what a user did next, among items left untouched.

A list has ten rows: a window of four consecutive samples of one user (windows do not overlap; what is left over at
the end of a user is dropped) and six items drawn evenly from those that training samples have and the user never
rated. All rows see the history before the window's first event. Rows lie in an order that seed and user alone decide.
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
SAMPLED: Final = 6
LIST_LENGTH: Final = WINDOW + SAMPLED


@dataclass(frozen=True, slots=True)
class Lists:
    """Rows [n, 10] of n lists: the event before which history ends, item row, label (0 for a sampled item)."""

    event: NDArray[np.int64]
    item: NDArray[np.int64]
    label: NDArray[np.float32]


def rerank_lists(dataset: Dataset, split: int, *, seed: int) -> Lists:
    """The lists of one split. Lists without any positive row are kept: metrics leave them out, training need not.

    Raises:
        InputError: a user rated nearly every item, so that six others cannot be drawn.
    """
    samples = dataset.samples(split)
    users = dataset.event_user[samples]
    known = np.unique(dataset.event_item[dataset.samples(TRAIN)])
    events: list[NDArray[np.int64]] = []
    items: list[NDArray[np.int64]] = []
    labels: list[NDArray[np.float32]] = []
    for chunk in np.split(samples, np.flatnonzero(np.diff(users)) + 1):
        windows = chunk[: len(chunk) // WINDOW * WINDOW].reshape(-1, WINDOW)
        if not len(windows):
            continue
        user = int(dataset.event_user[chunk[0]])
        own = dataset.event_item[dataset.offsets[user] : dataset.offsets[user + 1]]
        others = np.setdiff1d(known, own)
        if len(others) < SAMPLED:
            raise InputError(f"user {dataset.users[user].id!r} rated all items but {len(others)}: lists need {SAMPLED}")
        digest = hashlib.blake2b(f"{seed}:{dataset.users[user].id}".encode(), digest_size=8).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "little"))
        drawn = np.stack([generator.choice(others, SAMPLED, replace=False) for _ in windows])
        order = generator.permuted(np.tile(np.arange(LIST_LENGTH), (len(windows), 1)), axis=1)
        none = np.zeros((len(windows), SAMPLED), np.float32)
        shown = np.concatenate([dataset.event_item[windows], drawn], 1).astype(np.int64)
        items.append(np.take_along_axis(shown, order, 1))
        labels.append(np.take_along_axis(np.concatenate([dataset.labels[windows], none], 1), order, 1))
        events.append(np.repeat(windows[:, :1], LIST_LENGTH, 1))
    if not events:
        empty = np.zeros((0, LIST_LENGTH), np.int64)
        return Lists(empty, empty, empty.astype(np.float32))
    return Lists(np.concatenate(events), np.concatenate(items), np.concatenate(labels))
