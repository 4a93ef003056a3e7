"""Slates hold every later interaction of a test user and nothing else that the user rated."""

import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN
from kar_offline.replay.slates import slates

pytestmark = pytest.mark.unit


@pytest.fixture
def dataset():
    """Two users over ten items; user 1 is a test user with events on items 2, 3, 4, 5 and a cut-off of 2."""
    return Dataset(
        name="toy",
        schema=records_pb2.FeatureSchema(),
        users=[Entity(name, {}, {}) for name in "ab"],
        items=[Entity(str(number), {}, {}) for number in range(10)],
        offsets=np.array([0, 2, 6]),
        event_item=np.array([0, 1, 2, 3, 4, 5], dtype=np.int32),
        event_rating=np.array([5, 1, 5, 2, 4, 3], dtype=np.float32),
        event_time=np.arange(6),
        cutoff=np.array([1, 2], dtype=np.int32),
        event_split=np.repeat([TRAIN, TEST], [2, 4]).astype(np.uint8),
        positive_above=3.0,
    )


def test_later_interactions_come_first_with_their_labels(dataset):
    (slate,) = slates(dataset, size=6, seed=0)
    assert slate.user == 1
    assert slate.items[:2].tolist() == [4, 5]
    assert slate.labels.tolist() == [1.0, 0.0]


def test_padding_was_never_rated_and_does_not_repeat(dataset):
    (slate,) = slates(dataset, size=6, seed=0)
    padding = slate.items[2:].tolist()
    assert len(padding) == len(set(padding)) == 4
    assert set(padding) <= {0, 1, 6, 7, 8, 9}


def test_a_slate_is_never_larger_than_what_is_unrated(dataset):
    (slate,) = slates(dataset, size=100, seed=0)
    assert sorted(slate.items.tolist()) == [0, 1, 4, 5, 6, 7, 8, 9]


def test_more_later_interactions_than_the_size_are_all_kept(dataset):
    (slate,) = slates(dataset, size=1, seed=0)
    assert slate.items.tolist() == [4, 5]


def test_the_same_seed_draws_the_same_slate(dataset):
    draws = [next(slates(dataset, size=6, seed=seed)).items.tolist() for seed in (3, 3, 4, 5, 6)]
    assert draws[0] == draws[1]
    assert any(draw != draws[0] for draw in draws[2:])
