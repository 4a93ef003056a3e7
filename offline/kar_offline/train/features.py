"""Owns features as model input: encodings learned from the training split, and all users and items encoded once.

The sidecar encodes requests with the same `FeatureLayout` and `FeatureEncoder`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TRAIN
from kar_offline.models.inputs import Field, InputSpec
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.features import NUMERIC, RESERVED, FeatureEncoder, FeatureLayout

__all__ = ["EncodedDataset", "FeatureEncodings", "encode_dataset", "learn_features"]


@dataclass(frozen=True, slots=True)
class FeatureEncodings:
    """How raw features become indices and numbers."""

    encodings: Sequence[records_pb2.FeatureEncoding]
    """One per feature of the schema: vocabulary, or mean and scale."""
    item_ids: Sequence[str]
    """The item vocabulary; the item at position i has the index i + RESERVED."""


@dataclass(frozen=True, slots=True)
class EncodedDataset:
    """All users and items of a dataset as model input; rows are the rows of the dataset."""

    dataset: Dataset
    features: FeatureEncodings
    spec: InputSpec
    """Sizes of the inputs without knowledge."""
    categories: Tensor
    """[items of the vocabulary, Ic] int64, categories by item index."""
    columns: dict[str, Tensor]
    """`user_*` by user row, `item_*` by item row; names as in `kar_offline.models.inputs`."""


def learn_features(dataset: Dataset) -> FeatureEncodings:
    """Learn vocabularies and scales from the users of training events and the items of training samples.

    The item vocabulary holds the items of all training events.
    """
    events = np.flatnonzero(dataset.event_split == TRAIN)
    rows: dict[EntityKind, NDArray[np.integer]] = {
        USER: np.unique(dataset.event_user[events]),
        ITEM: np.unique(dataset.event_item[dataset.samples(TRAIN)]),
    }
    encodings = []
    for feature in dataset.schema.features:
        kind = EntityKind.of_number(feature.entity)
        encodings.append(_learn_encoding(feature, dataset.entities[kind], rows[kind]))
    return FeatureEncodings(encodings, [dataset.items[row].id for row in np.unique(dataset.event_item[events])])


def _learn_encoding(
    feature: records_pb2.Feature, entities: Sequence[Entity], rows: NDArray[np.integer]
) -> records_pb2.FeatureEncoding:
    """Vocabulary, or mean and scale, of one feature among the entities at `rows`."""
    present = [value for row in rows if (value := entities[row].features.get(feature.name)) is not None]
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


def encode_dataset(dataset: Dataset, features: FeatureEncodings | None = None) -> EncodedDataset:
    """Encode every user and item.

    Args:
        dataset: The dataset.
        features: Encodings learned before; None learns them from this dataset.
    """
    features = features or learn_features(dataset)
    encoder = FeatureEncoder(dataset.schema, features.encodings, features.item_ids)
    columns: dict[str, Tensor] = {}
    for kind, entities in dataset.entities.items():
        layout = FeatureLayout(dataset.schema, kind)
        rows = np.concatenate([layout.row(entity.features) for entity in entities])
        categories, numbers, _ = encoder.rows(layout, rows)
        columns |= {f"{kind}_categorical": torch.from_numpy(categories), f"{kind}_numeric": torch.from_numpy(numbers)}
    index = torch.from_numpy(encoder.items([item.id for item in dataset.items]))
    known = index >= RESERVED
    vocabulary = len(features.item_ids) + RESERVED
    categories_by_index = torch.zeros(vocabulary, columns["item_categorical"].shape[1], dtype=torch.int64)
    categories_by_index[index[known]] = columns["item_categorical"][known]
    spec = _input_spec(dataset.schema, features)
    return EncodedDataset(dataset, features, spec, categories_by_index, {**columns, "item_index": index})


def _input_spec(schema: records_pb2.FeatureSchema, features: FeatureEncodings) -> InputSpec:
    """Sizes of the model's inputs without knowledge."""
    sizes = {(e.entity, e.name): len(e.vocabulary) + RESERVED for e in features.encodings}

    def fields(kind: EntityKind) -> tuple[Field, ...]:
        categorical = (f for f in schema.features if f.entity == kind.number and f.type != NUMERIC)
        return tuple(Field(sizes[f.entity, f.name], f.width) for f in categorical)

    def numbers(kind: EntityKind) -> int:
        return sum(f.entity == kind.number and f.type == NUMERIC for f in schema.features)

    return InputSpec(
        items=len(features.item_ids) + RESERVED,
        user_fields=fields(USER),
        item_fields=fields(ITEM),
        user_numbers=numbers(USER),
        item_numbers=numbers(ITEM),
    )
