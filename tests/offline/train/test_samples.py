import numpy as np
import pytest
import torch
from tests.support.training import SCHEMA, make_dataset

from kar_offline.dataset.splits import VALIDATION
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.samples import samples_of_split
from kar_sidecar.entities import USER
from kar_sidecar.features import FeatureEncoder, FeatureLayout, History

pytestmark = pytest.mark.unit


def test_inputs_equal_what_serving_encodes():
    dataset = make_dataset()
    data = encode_dataset(dataset)
    samples = samples_of_split(data, VALIDATION)
    encoder = FeatureEncoder(SCHEMA, data.features.encodings, data.features.item_ids)
    values = Batches(data, samples, KnowledgeInputs(ARMS["control"], dataset)).inputs(torch.arange(len(samples)))
    for row, event in enumerate(dataset.samples(VALIDATION)):
        seen = dataset.history(event, 4)
        history = History(tuple(dataset.items[i].id for i in dataset.event_item[seen]), dataset.event_rating[seen])
        items, ratings = encoder.history(history)
        user, item = dataset.users[dataset.event_user[event]], dataset.items[dataset.event_item[event]]
        categories, numbers, _ = encoder.rows(
            FeatureLayout(SCHEMA, USER), FeatureLayout(SCHEMA, USER).row(user.features)
        )
        expected = {
            "history_item": items,
            "history_rating": ratings,
            "user_categorical": categories[0],
            "user_numeric": numbers[0],
            "item_index": encoder.items([item.id])[0],
        }
        for name, value in expected.items():
            np.testing.assert_array_equal(values[name][row].numpy(), value, err_msg=name)
        assert samples.label[row] == float(dataset.event_rating[event] > 3)
    known = data.columns["item_index"] >= 2
    torch.testing.assert_close(
        data.categories[data.columns["item_index"][known]], data.columns["item_categorical"][known]
    )
    assert (data.categories[:2] == 0).all()
