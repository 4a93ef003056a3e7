"""Fixtures: small work folders."""

from dataclasses import replace

import numpy as np
import pytest
from tests.support.text_vectors import write_text_vectors

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER

DIM = 5


@pytest.fixture
def work(tmp_path):
    """Forty users, ten ratings each of thirty items, all items with a text."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(40), 10)
    dataset = Dataset.from_events(
        "tiny",
        records_pb2.FeatureSchema(
            history_length=4,
            features=[records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC)],
        ),
        [Entity(f"u{i}", {"age": i}, {}) for i in range(40)],
        [Entity(f"i{i:02}", {}, {}) for i in range(30)],
        user=user,
        item=np.concatenate([rng.permutation(30)[:10] for _ in range(40)]),
        rating=rng.integers(1, 6, len(user)).astype(np.float32),
        time=np.tile(np.arange(10), 40),
        positive_above=3,
    )
    (tmp_path / "dataset").mkdir()
    dataset.save(tmp_path / "dataset")
    write_text_vectors(tmp_path / "encoding", dataset, dim=DIM, generator=rng)
    return WorkFolder(tmp_path)


@pytest.fixture
def titled(work):
    """The same with titles: item 3 is Film 3."""
    dataset = work.read(Dataset)
    named = [Entity(item.id, item.features, {"title": f"Film {at}"}) for at, item in enumerate(dataset.items)]
    replace(dataset, items=named).save(work.dataset)
    return work
