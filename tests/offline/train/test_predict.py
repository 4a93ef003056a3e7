import pytest
import torch
from tests.support.rounding import SCORE_LIMIT
from tests.support.training import (
    ADAPTOR,
    write_work,
)

from kar_offline.dataset.splits import TEST, TRAIN
from kar_offline.train.arms import ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.checkpoint import build_model
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.samples import samples_of_split
from kar_offline.work_folder import WorkFolder

pytestmark = pytest.mark.unit


def test_predictions_equal_one_sample_at_a_time(tmp_path):
    dataset = write_work(WorkFolder(tmp_path))
    data = encode_dataset(dataset)
    samples = samples_of_split(data, TEST)
    given = KnowledgeInputs.for_training(
        ARMS["paper"], data, samples_of_split(data, TRAIN), tmp_path / "encoding", seed=0
    )
    torch.manual_seed(0)
    model = build_model("dcnv2", given.spec(data.spec, 3), data.categories, {**ADAPTOR, "towers": ("user", "item")})
    torch.nn.init.normal_(model.adaptor.user_neutral)
    texts, expected = given.texts, []
    batches = Batches(data, samples, given)
    for i in range(len(samples)):
        at = torch.tensor([i])
        user, item = samples.user[i], samples.item[i]
        own = {
            "user_knowledge": model.adaptor.tower(texts.user[user : user + 1], "user"),
            "item_knowledge": model.adaptor.tower(texts.item[item : item + 1], "item"),
        }
        if not texts.user_present[user]:
            own["user_knowledge"] = model.adaptor.user_neutral[None]
        if not texts.item_present[item]:
            own["item_knowledge"] = model.adaptor.item_neutral[None]
        expected.append(model.eval()({**batches.inputs(at), **own}))
    found = predict_logits(model, batches)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=SCORE_LIMIT)
