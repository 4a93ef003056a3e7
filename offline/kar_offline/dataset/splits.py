"""Owns how events are split into training, validation and test: by a seeded hash of the user, or by global time."""

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import InputError

__all__ = [
    "FOLDS",
    "SEED",
    "SPLITS",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "hash_fraction",
    "split_by_time",
    "split_by_user",
    "split_of",
]

TRAIN: Final = 0
VALIDATION: Final = 1
TEST: Final = 2
SPLITS: Final = ("train", "validation", "test")
"""Names of the splits by number."""
SEED: Final = 2024
"""Default seed of a split by user."""
FOLDS: Final = 5
"""Default number of folds of a split by user; one fold is the test split."""
VALIDATION_SHARE: Final = 0.1
"""Share of validation users among the users outside of the test split."""


def hash_fraction(seed: int, user_id: str) -> float:
    """A number in [0, 1) that depends on seed and user id only."""
    digest = hashlib.blake2b(f"{seed}:{user_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def split_of(seed: int, user_id: str, fold: int = 0, folds: int = FOLDS) -> int:
    """The split of one user; it does not depend on the other users. Each fold tests on its own interval of hashes."""
    place = (hash_fraction(seed, user_id) - fold / folds) % 1
    if place < 1 / folds:
        return TEST
    return VALIDATION if place < 1 / folds + VALIDATION_SHARE * (1 - 1 / folds) else TRAIN


def split_by_user(user_ids: Sequence[str], fold: int, folds: int, seed: int) -> NDArray[np.uint8]:
    """The split of each user [U].

    Raises:
        InputError: there is no such fold.
    """
    if not (0 <= fold < folds and folds > 1):
        raise InputError(f"fold {fold} of {folds} does not exist: give at least 2 folds, and count them from 0")
    return np.array([split_of(seed, user_id, fold, folds) for user_id in user_ids], dtype=np.uint8)


def split_by_time(
    event_time: NDArray[np.integer], sample_events: NDArray[np.integer], test_share: float, validation_share: float
) -> NDArray[np.uint8]:
    """The split of each event [E]: the latest samples are for test, the samples before them for validation.

    Events of the same second are never divided: if a split begins among them, it takes them all.

    Args:
        event_time: Seconds [E].
        sample_events: Event numbers of the samples [S]; the shares count samples only.
        test_share: Share of the samples in the test split.
        validation_share: Share of the samples in the validation split.
    """
    times = np.sort(event_time[sample_events])
    shares = (1 - test_share - validation_share, 1 - test_share)
    starts = [times[min(round(share * len(times)), len(times) - 1)] for share in shares if len(times)]
    return np.searchsorted(starts, event_time, side="right").astype(np.uint8)
