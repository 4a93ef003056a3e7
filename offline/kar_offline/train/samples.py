"""Owns the rows that a model scores: the samples or the rerank lists of one split, with their histories."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kar_offline.dataset.rerank_lists import rerank_lists
from kar_offline.train.features import EncodedDataset
from kar_sidecar.features import PADDING, rating_bucket

__all__ = ["Samples", "lists_of_split", "samples_before", "samples_of_split"]


@dataclass(frozen=True, slots=True)
class Samples:
    """S rows to score. A row is a user, an item and the history of the user before an event."""

    user: Tensor
    """[S] int64, row of the dataset."""
    item: Tensor
    """[S] int64, row of the dataset."""
    event: Tensor
    """[S] int64, the event before which the history ends."""
    history_item: Tensor
    """[S, L] int64, item indices; 0 where padded."""
    history_rating: Tensor
    """[S, L] int64, rating buckets; 0 where padded."""
    label: Tensor
    """[S] float32, 0 or 1."""
    list_length: int = 1
    """Rows of a list. The rows of a list are side by side and have one history; 1 if rows are independent."""

    def __len__(self) -> int:
        """Number of rows S."""
        return len(self.label)

    def rows(self, numbers: Tensor) -> "Samples":
        """The rows with these numbers [B]; the rows of a list must stay side by side."""
        columns = (self.user, self.item, self.event, self.history_item, self.history_rating, self.label)
        user, item, event, history_item, history_rating, label = (column[numbers] for column in columns)
        return Samples(user, item, event, history_item, history_rating, label, self.list_length)


def samples_of_split(data: EncodedDataset, split: int) -> Samples:
    """The samples of one split, one row per event."""
    events = data.dataset.samples(split)
    return samples_before(data, events, data.dataset.event_item[events], data.dataset.labels[events])


def lists_of_split(data: EncodedDataset, split: int, *, seed: int) -> Samples:
    """The lists of one split that rerankers order; see `kar_offline.dataset.rerank_lists`."""
    lists = rerank_lists(data.dataset, split, seed=seed)
    rows = (lists.event.ravel(), lists.item.ravel(), lists.label.ravel())
    return samples_before(data, *rows, list_length=lists.label.shape[1])


def samples_before(
    data: EncodedDataset,
    events: NDArray[np.integer],
    items: NDArray[np.integer],
    labels: NDArray[np.float32],
    list_length: int = 1,
) -> Samples:
    """Rows of any items, scored at the time just before an event of their user.

    Histories equal the online ones of `kar_sidecar.features.FeatureEncoder.history`.

    Args:
        data: The dataset.
        events: Event numbers [S].
        items: Item rows [S].
        labels: Labels [S].
        list_length: Rows of a list.
    """
    history, rating = data.dataset.history_windows(events, int(data.dataset.schema.history_length))  # [S, L] each
    real = history >= 0
    index = data.columns["item_index"].numpy()[history]
    return Samples(
        user=torch.from_numpy(data.dataset.event_user[events].astype(np.int64)),
        item=torch.from_numpy(items.astype(np.int64)),
        event=torch.from_numpy(events.astype(np.int64)),
        history_item=torch.from_numpy(np.where(real, index, PADDING)),
        history_rating=torch.from_numpy(np.where(real, rating_bucket(rating), PADDING)),
        label=torch.from_numpy(labels),
        list_length=list_length,
    )
