"""Owns model input as arrays: encodings learned on training users, and every sample of a split, encoded once.

The same `FeatureLayout` and `FeatureEncoder` encode requests online.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.rerank_lists import rerank_lists
from kar_offline.dataset.splits import TRAIN
from kar_offline.models.inputs import REQUEST_OF_ROW, Field, InputSpec
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.features import NUMERIC, PADDING, RESERVED, FeatureEncoder, FeatureLayout, rating_bucket

__all__ = ["EncodedDataset", "FeatureEncodings", "Samples", "encode_dataset", "learn_features"]


@dataclass(frozen=True, slots=True)
class FeatureEncodings:
    """How raw features become indices and numbers: one encoding a feature of the schema, and the item vocabulary."""

    encodings: Sequence[records_pb2.FeatureEncoding]
    item_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows to score: dataset rows [S] int64 of users and items, histories [S, L] int64, labels [S] float32."""

    user: Tensor
    item: Tensor
    event: Tensor
    """[S] int64; a row's history is what its user did before this event."""
    history_item: Tensor
    history_rating: Tensor
    label: Tensor
    list_length: int = 1
    """Rows that are one list, side by side and of one history; 1 where every row stands alone."""

    def __len__(self) -> int:
        """Number of rows S."""
        return len(self.label)

    def rows(self, at: Tensor) -> "Samples":
        """The rows numbered `at` [B], whole lists side by side."""
        columns = (self.user, self.item, self.event, self.history_item, self.history_rating, self.label)
        user, item, event, history_item, history_rating, label = (column[at] for column in columns)
        return Samples(user, item, event, history_item, history_rating, label, self.list_length)


@dataclass(frozen=True, slots=True)
class EncodedDataset:
    """All users and items of a dataset as model input, row i of each being dataset row i."""

    dataset: Dataset
    features: FeatureEncodings
    spec: InputSpec
    """Sizes without knowledge."""
    categories: Tensor
    """[items of the vocabulary, Ic] int64 by item index."""
    columns: dict[str, Tensor]
    """`user_*` by user row, `item_*` by item row; names as in `kar_offline.models.inputs`."""

    def samples(self, split: int) -> Samples:
        """The samples of one split, each event a row."""
        events = self.dataset.samples(split)
        return self.at(events, self.dataset.event_item[events], self.dataset.labels[events])

    def lists(self, split: int, *, seed: int) -> Samples:
        """The lists of one split that rerankers order (`kar_offline.dataset.rerank_lists`)."""
        lists = rerank_lists(self.dataset, split, seed=seed)
        flat = (lists.event.ravel(), lists.item.ravel(), lists.label.ravel())
        return self.at(*flat, list_length=lists.label.shape[1])

    def at(
        self, events: NDArray[np.integer], items: NDArray[np.integer], labels: NDArray[np.float32], list_length: int = 1
    ) -> Samples:
        """Rows [S] of any items just before events of their users, histories as `FeatureEncoder.history` gives them."""
        before, rating = self.dataset.history_windows(events, int(self.dataset.schema.history_length))
        seen = before >= 0
        index = self.columns["item_index"].numpy()[before]
        return Samples(
            user=torch.from_numpy(self.dataset.event_user[events].astype(np.int64)),
            item=torch.from_numpy(items.astype(np.int64)),
            event=torch.from_numpy(events.astype(np.int64)),
            history_item=torch.from_numpy(np.where(seen, index, PADDING)),
            history_rating=torch.from_numpy(np.where(seen, rating_bucket(rating), PADDING)),
            label=torch.from_numpy(labels),
            list_length=list_length,
        )

    def inputs(self, samples: Samples, at: Tensor) -> dict[str, Tensor]:
        """Model inputs of the rows numbered `at` [B], whole lists side by side.

        Every list is one request; where rows stand alone, each is its own and `request_of_row` is left out.
        """
        lists = at[:: samples.list_length]
        rows = {"user": samples.user[lists], "item": samples.item[at]}
        inputs = {name: column[rows[name.split("_")[0]]] for name, column in self.columns.items()}
        inputs |= {"history_item": samples.history_item[lists], "history_rating": samples.history_rating[lists]}
        if samples.list_length > 1:
            inputs[REQUEST_OF_ROW] = torch.arange(len(lists)).repeat_interleave(samples.list_length)
        return inputs


def _learn(
    feature: records_pb2.Feature, features: Sequence[dict], rows: NDArray[np.integer]
) -> records_pb2.FeatureEncoding:
    present = [value for row in rows if (value := features[row].get(feature.name)) is not None]
    encoding = records_pb2.FeatureEncoding(name=feature.name, entity=feature.entity)
    if feature.type == NUMERIC:
        numbers = np.array(present, dtype=np.float64)
        numbers = numbers[np.isfinite(numbers)]
        encoding.mean = float(numbers.mean()) if len(numbers) else 0.0
        encoding.scale = float(numbers.std()) if len(numbers) and numbers.std() > 0 else 1.0
    else:
        values = ((value,) if isinstance(value, str) else value for value in present)
        encoding.vocabulary.extend(sorted({text for value in values for text in value}))
    return encoding


def learn_features(dataset: Dataset) -> FeatureEncodings:
    """Learn from the users of training events and the items of training samples.

    The item vocabulary has all items of training events.
    """
    events = np.flatnonzero(dataset.event_split == TRAIN)
    rows: dict[EntityKind, NDArray[np.integer]] = {
        USER: np.unique(dataset.event_user[events]),
        ITEM: np.unique(dataset.event_item[dataset.samples(TRAIN)]),
    }
    raw = {USER: [u.features for u in dataset.users], ITEM: [i.features for i in dataset.items]}
    kinds = [EntityKind.of_number(feature.entity) for feature in dataset.schema.features]
    encodings = [
        _learn(feature, raw[kind], rows[kind]) for kind, feature in zip(kinds, dataset.schema.features, strict=True)
    ]
    return FeatureEncodings(encodings, [dataset.items[row].id for row in np.unique(dataset.event_item[events])])


def encode_dataset(dataset: Dataset, features: FeatureEncodings | None = None) -> EncodedDataset:
    """Encode every user and item with `features`, by default learned here."""
    features = features or learn_features(dataset)
    encoder = FeatureEncoder(dataset.schema, features.encodings, features.item_ids)
    columns: dict[str, Tensor] = {}
    for kind, entities in ((USER, dataset.users), (ITEM, dataset.items)):
        layout = FeatureLayout(dataset.schema, kind)
        rows = np.concatenate([layout.row(entity.features) for entity in entities])
        categories, numbers, _ = encoder.rows(layout, rows)
        columns |= {f"{kind}_categorical": torch.from_numpy(categories), f"{kind}_numeric": torch.from_numpy(numbers)}
    index = torch.from_numpy(encoder.items([item.id for item in dataset.items]))
    items = len(features.item_ids) + RESERVED
    by_index = torch.zeros(items, columns["item_categorical"].shape[1], dtype=torch.int64)
    known = index >= RESERVED
    by_index[index[known]] = columns["item_categorical"][known]
    sizes = {(e.entity, e.name): len(e.vocabulary) + RESERVED for e in features.encodings}

    def fields(kind: EntityKind) -> tuple[Field, ...]:
        chosen = (f for f in dataset.schema.features if f.entity == kind.number and f.type != NUMERIC)
        return tuple(Field(sizes[f.entity, f.name], f.width) for f in chosen)

    def numbers_of(kind: EntityKind) -> int:
        return sum(f.entity == kind.number and f.type == NUMERIC for f in dataset.schema.features)

    spec = InputSpec(items, fields(USER), fields(ITEM), numbers_of(USER), numbers_of(ITEM))
    return EncodedDataset(dataset, features, spec, by_index, {**columns, "item_index": index})
