from dataclasses import replace

import numpy as np
import pytest

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.rerank_lists import LIST_LENGTH, rerank_lists
from kar_offline.dataset.splits import TEST, TRAIN
from kar_sidecar.errors import InputError

pytestmark = pytest.mark.unit


def make_dataset(items=40, each=18):
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(12), each)
    dataset = Dataset.from_events(
        "tiny",
        records_pb2.FeatureSchema(history_length=3),
        [Entity(f"u{i}", {}, {}) for i in range(12)],
        [Entity(f"i{i:02}", {}, {}) for i in range(items)],
        user=user,
        item=np.concatenate([rng.permutation(items)[:each] for _ in range(12)]),
        rating=rng.integers(1, 6, len(user)).astype(np.float32),
        time=np.tile(np.arange(each), 12),
        positive_above=3,
    )
    return replace(dataset, event_split=np.repeat([TRAIN] * 8 + [TEST] * 4, each).astype(np.uint8))


@pytest.mark.parametrize("split", [TRAIN, TEST])
def test_a_list_is_a_window_among_items_that_the_user_never_rated(split):
    dataset = make_dataset()
    lists = rerank_lists(dataset, split, seed=3)
    samples = dataset.samples(split)
    # Nine samples a user (the first nine feed prompts): two windows of four, the ninth is dropped.
    users = np.unique(dataset.event_user[samples])
    assert lists.item.shape == (2 * len(users), LIST_LENGTH)
    known = set(dataset.event_item[dataset.samples(TRAIN)].tolist())
    for event, item, label in zip(lists.event, lists.item, lists.label, strict=True):
        assert len(set(event)) == 1
        assert len(set(item)) == LIST_LENGTH
        user = dataset.event_user[event[0]]
        window = np.arange(event[0], event[0] + 4)
        assert (dataset.event_user[window] == user).all()
        assert set(window) <= set(samples)
        own = set(dataset.event_item[dataset.event_user == user].tolist())
        shown = {int(dataset.event_item[e]): float(dataset.labels[e]) for e in window}
        for one, given in zip(item.tolist(), label.tolist(), strict=True):
            assert given == shown.get(one, 0)
            assert one in shown or (one not in own and one in known)
        assert set(shown) <= set(item.tolist())


def test_lists_depend_on_seed_and_user_alone():
    dataset = make_dataset()
    lists = rerank_lists(dataset, TEST, seed=3)
    assert np.array_equal(rerank_lists(dataset, TEST, seed=3).item, lists.item)
    assert not np.array_equal(rerank_lists(dataset, TEST, seed=4).item, lists.item)
    split = dataset.event_split.copy()
    split[dataset.event_user == 8] = TRAIN + 1  # one test user less
    fewer = rerank_lists(replace(dataset, event_split=split), TEST, seed=3)
    np.testing.assert_array_equal(fewer.item, lists.item[2:])
    assert len(rerank_lists(dataset, TRAIN + 1, seed=3).item) == 0


def test_a_user_who_rated_everything_is_named():
    with pytest.raises(InputError, match=r"user 'u8' rated all items but 4"):
        rerank_lists(make_dataset(items=22), TEST, seed=0)
