from dataclasses import replace

import numpy as np
import pytest
from tests.support.training import ITEMS, USERS, make_dataset

from kar_offline.dataset.entities import Entity
from kar_offline.train.features import learn_features
from kar_sidecar.entities import ITEM, USER

pytestmark = pytest.mark.unit


def test_learned_encodings_by_hand():
    encodings = learn_features(make_dataset()).encodings
    assert [(e.entity, e.name) for e in encodings] == [
        (USER.number, "age"),
        (USER.number, "job"),
        (ITEM.number, "genres"),
    ]
    # Training users are 20 to 27 years old: mean 23.5, variance (8^2 - 1) / 12.
    assert encodings[0].mean == pytest.approx(23.5)
    assert encodings[0].scale == pytest.approx((63 / 12) ** 0.5)
    assert list(encodings[1].vocabulary) == ["a", "b"]
    assert list(encodings[2].vocabulary) == ["x", "y"]


def test_item_vocabulary_has_the_items_of_training_users_only():
    dataset = make_dataset()
    item = dataset.event_item.copy()
    item[item == 3] = 4
    item[dataset.offsets[10]] = 3  # a test user's
    order = np.lexsort((item, dataset.event_time, dataset.event_user))
    dataset = replace(dataset, event_item=item[order], event_rating=dataset.event_rating[order])
    assert "i3" not in learn_features(dataset).item_ids
    assert len(learn_features(dataset).item_ids) == ITEMS - 1


def test_a_constant_or_absent_number_has_scale_one():
    dataset = make_dataset()
    for ages, mean in (([30.0] * USERS, 30.0), ([None] * USERS, 0.0)):
        users = [Entity(u.id, {**u.features, "age": age}, {}) for u, age in zip(dataset.users, ages, strict=True)]
        encoding = learn_features(replace(dataset, users=users)).encodings[0]
        assert (encoding.mean, encoding.scale) == (mean, 1.0)
