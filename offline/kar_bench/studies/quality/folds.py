"""Owns the test rows of one fold: labels, users, the bootstrap's weights, and the buckets of the breakdowns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.rerank_lists import rerank_lists
from kar_offline.dataset.splits import TEST, TRAIN
from kar_offline.evaluate.metrics import bootstrap_weights
from kar_offline.knowledge.records import read_knowledge
from kar_offline.work_folder import WorkFolder

__all__ = ["BUCKETS", "FoldLists", "FoldSamples", "bucket_names", "read_confidence"]

BUCKETS: Final[Mapping[str, tuple[int, ...]]] = {
    "item_ratings": (0, 1, 6, 21, 101),
    "user_events": (0, 51, 101, 201),
    "events_before": (0, 11, 31, 101),
}
"""Lower bounds: training ratings of the item, all events of the user, events of the user before the sample."""
CONFIDENCES: Final = ("high", "medium", "low")
NOT_STATED: Final = "not said"


def bucket_names(by: str) -> Sequence[str]:
    """The names of the buckets of one division, in their order."""
    if by not in BUCKETS:
        return (*CONFIDENCES, NOT_STATED)
    bounds = BUCKETS[by]
    names = [f"{low} to {high - 1}" if high - low > 1 else f"{low}" for low, high in pairwise(bounds)]
    return (*names, f"{bounds[-1]} or more")


def read_confidence(work: WorkFolder) -> dict[str, str]:
    """How sure the writer of an item's text was, by item id, where the text says so."""
    if not (work.knowledge).is_dir():
        return {}
    records = read_knowledge(work.knowledge, "item")
    return {record.id: record.confidence for record in records if record.confidence in CONFIDENCES}


@dataclass(frozen=True, slots=True)
class FoldSamples:
    """The test samples of one fold; arrays are [S] unless they say otherwise."""

    labels: NDArray[np.float32]
    users: NDArray[np.int32]
    buckets: Mapping[str, NDArray[np.int64]]
    """Number of each sample's bucket, by division."""
    weights: NDArray[np.float64]
    """[R, U] the bootstrap's weights of users."""

    @staticmethod
    def of(dataset: Dataset, confidence: Mapping[str, str], *, seed: int, resamples: int) -> "FoldSamples":
        """The fold that `dataset` is split for; `confidence` is by item id."""
        events = dataset.samples(TEST)
        users, items = dataset.event_user[events], dataset.event_item[events]
        training_items = dataset.event_item[dataset.event_split == TRAIN]
        values = {
            "item_ratings": np.bincount(training_items, minlength=len(dataset.items))[items],
            "user_events": np.diff(dataset.offsets)[users],
            "events_before": events - dataset.offsets[users],
        }
        buckets = {name: np.searchsorted(BUCKETS[name], value, side="right") - 1 for name, value in values.items()}
        if confidence:
            names = bucket_names("confidence")
            by_item = [names.index(confidence.get(item.id, NOT_STATED)) for item in dataset.items]
            buckets["confidence"] = np.array(by_item, np.int64)[items]
        weights = bootstrap_weights(len(np.unique(users)), seed=seed, resamples=resamples)
        return FoldSamples(dataset.labels[events], users, buckets, weights)


@dataclass(frozen=True, slots=True)
class FoldLists:
    """The test lists of one fold and seed."""

    labels: NDArray[np.float32]
    """[n, C]"""
    users: NDArray[np.int64]
    """[n] positions in the bootstrap's weights."""
    weights: NDArray[np.float64]
    """[R, U] the bootstrap's weights of users."""

    @staticmethod
    def of(dataset: Dataset, fold: FoldSamples, seed: int) -> "FoldLists":
        """The lists of the fold that `dataset` is split for."""
        lists = rerank_lists(dataset, TEST, seed=seed)
        # Users with too few samples for a list have weights all the same.
        owners = np.concatenate([fold.users, dataset.event_user[lists.event[:, 0]]])
        _, position = np.unique(owners, return_inverse=True)
        return FoldLists(lists.label, position[len(fold.users) :], fold.weights)

    def resampled_mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means [R] of the lists' values [n] under the weights; NaN values are left out."""
        known = np.isfinite(values)
        users = self.weights.shape[1]
        total = np.bincount(self.users[known], values[known], users)
        return (self.weights @ total) / (self.weights @ np.bincount(self.users[known], minlength=users))
