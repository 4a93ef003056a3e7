import re

import numpy as np
import pytest
from tests.support.work_folders import QUICK_TRAINING

from kar_bench.harness import to_json
from kar_bench.studies.llm_reranking import Lists, LlmRerankingOptions, direct_table, measure_direct, read_order
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.rerank_lists import rerank_lists
from kar_offline.dataset.splits import TEST
from kar_offline.generate import ScriptedModel


@pytest.mark.parametrize(
    ("text", "order", "complete"),
    [
        ("3, 1, 2", [2, 0, 1], True),
        ("I rank them: 2 then 2, then 3", [1, 2, 0], False),
        ("none of these", [0, 1, 2], False),
        ("1997 is a year, 4 is too many, 3.", [2, 0, 1], False),
    ],
)
def test_an_order_is_read_from_what_a_model_says(text, order, complete):
    assert read_order(text, 3) == (order, complete)


def test_lists_are_of_distinct_users_and_prompts_show_the_past_alone(titled):
    dataset = titled.read(Dataset).split_by_user(fold=0, folds=5)
    all_lists = rerank_lists(dataset, TEST, seed=0)
    lists = Lists.of(dataset, 3)
    events = all_lists.event[lists.numbers, 0]
    assert len(set(dataset.event_user[events].tolist())) == len(lists.numbers) == 3
    assert lists.labels.any(1).all()
    for number, event, prompt in zip(lists.numbers, events.tolist(), lists.prompts, strict=True):
        user = dataset.event_user[event]
        past = dataset.event_item[dataset.offsets[user] : event]
        rated, shown = prompt.split("Candidates:")
        assert re.findall(r'"Film (\d+)"', rated) == [str(item) for item in past[-10:]]
        assert re.findall(r'"Film (\d+)"', shown) == [str(item) for item in all_lists.item[number]]


def test_a_model_that_knows_the_labels_is_perfect_and_ours_stand_beside_it(titled):
    dataset = titled.read(Dataset).split_by_user(fold=0, folds=5)
    lists = Lists.of(dataset, 4)
    best = {
        prompt: ", ".join(str(row + 1) for row in np.argsort(-labels, kind="stable"))
        for prompt, labels in zip(lists.prompts, lists.labels, strict=True)
    }
    llm = ScriptedModel(best.__getitem__, model="oracle")
    report = measure_direct(titled, titled.encoding, llm, LlmRerankingOptions("dlcm", 4), settings=QUICK_TRAINING)
    assert llm.asked == lists.prompts
    rows = {row["ranker"]: row for row in to_json(report)["rows"]}
    assert list(rows) == ["oracle", "random order", "dlcm control", "dlcm knowledge"]
    assert rows["oracle"]["ndcg"] == rows["oracle"]["map"] == rows["oracle"]["complete"] == 1
    assert all(0 < row["ndcg"] <= 1 for row in rows.values())
    assert direct_table(report).renderables
