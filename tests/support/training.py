"""Owns builders: a tiny dataset with encoded texts, and settings that train on it within a second."""

from dataclasses import replace

import numpy as np
from tests.support.text_vectors import write_text_vectors

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.train import TrainSettings
from kar_sidecar.entities import ITEM, USER

__all__ = [
    "ADAPTOR",
    "CATEGORICAL",
    "DIM",
    "ITEMS",
    "NUMERIC",
    "SCHEMA",
    "SMALL",
    "USERS",
    "make_dataset",
    "write_work",
]

NUMERIC, CATEGORICAL = records_pb2.FEATURE_TYPE_NUMERIC, records_pb2.FEATURE_TYPE_CATEGORICAL
SCHEMA = records_pb2.FeatureSchema(
    history_length=4,
    features=[
        records_pb2.Feature(name="age", entity=USER.number, type=NUMERIC),
        records_pb2.Feature(name="job", entity=USER.number, type=CATEGORICAL, width=1),
        records_pb2.Feature(name="genres", entity=ITEM.number, type=CATEGORICAL, width=2),
    ],
)
SMALL = TrainSettings(epochs=2, batch=8, shared_experts=1, dedicated_experts=1, expert_hidden=4, knowledge_width=3)
USERS, ITEMS, DIM = 12, 9, 5
ADAPTOR = {"dim": DIM, "hidden": 4, "out": 3, "shared": 1, "dedicated": 1}


def make_dataset(seed=0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(USERS), 8)
    item = np.concatenate([rng.permutation(ITEMS)[:8] for _ in range(USERS)])
    dataset = Dataset.from_events(
        "tiny",
        SCHEMA,
        [Entity(f"u{i}", {"age": 20 + i, "job": "ab"[i % 2]}, {}) for i in range(USERS)],
        [Entity(f"i{i}", {"genres": ["x", "y"][: 1 + i % 2]}, {}) for i in range(ITEMS)],
        user=user,
        item=item,
        rating=rng.integers(1, 6, len(user)).astype(np.float32),
        time=rng.integers(0, 50, len(user)),
        seed=0,
        positive_above=3,
    )
    return replace(dataset, event_split=np.repeat([TRAIN] * 8 + [VALIDATION] * 2 + [TEST] * 2, 8).astype(np.uint8))


def write_work(work, seed=0, without=1):
    """Dataset and encodings below `work`; row `without` of each kind has no text."""
    dataset = make_dataset(seed)
    work.dataset.mkdir(parents=True)
    dataset.save(work.dataset)
    generator = np.random.default_rng(seed)
    write_text_vectors(work.encoding, dataset, dim=DIM, generator=generator, without=without, encoder_id="e1")
    return dataset
