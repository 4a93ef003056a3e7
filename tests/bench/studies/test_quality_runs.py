"""Which trainings there are, and lists in the order of an initial ranker."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.work_folders import QUICK_TRAINING

from kar_bench.harness import to_json
from kar_bench.splits import SplitProtocol
from kar_bench.studies.quality.measure import measure_quality, train_jobs
from kar_bench.studies.quality_runs import default_jobs, possible_arms
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST, TRAIN
from kar_offline.evaluate.ranking import average_precision
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.train.arms import ARMS, DEFAULT_ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import InitialRanker, Run, new_model
from kar_offline.train.samples import lists_of_split, samples_of_split
from kar_sidecar.errors import InputError

SETTINGS = replace(QUICK_TRAINING, epochs=2)
PROTOCOL = SplitProtocol("user", 2)


def trained(work, jobs, seen=None):
    notices = [] if seen is None else seen
    return train_jobs(
        work, PROTOCOL, "encoding", jobs, SETTINGS, workers=0, on_epoch=lambda job, epoch: notices.append((job, epoch))
    )


def measured(*arguments, **options):
    """The report as JSON."""
    return to_json(measure_quality(*arguments, **options))


def test_the_default_grid():
    jobs = default_jobs([], [], range(5), [0])
    by_model = {model: {job.arm for job in jobs if job.model == model} for model in (*BACKBONES, *RERANKERS)}
    assert by_model["dcnv2"] == by_model["din"] == set(ARMS) - {"both_texts", "cf_both_texts"}
    assert all(arms == set(DEFAULT_ARMS) for model, arms in by_model.items() if model not in ("dcnv2", "din"))
    assert len(set(jobs)) == len(jobs) == 5 * sum(map(len, by_model.values()))
    assert [job.fold for job in jobs] == sorted(job.fold for job in jobs)


def test_arms_that_read_users_need_texts_about_users(work, tmp_path):
    assert possible_arms(work.encoding) == list(ARMS)
    header = json.loads((work.encoding / "knowledge_user.json").read_text())
    header["text_sha256"] = [None] * len(header["ids"])
    (tmp_path / "knowledge_user.json").write_text(json.dumps(header))
    possible = possible_arms(tmp_path)
    assert set(ARMS) - set(possible) == {"paper", "users_only", "one_moe", "one_mlp", "no_adaptor"}
    assert {job.arm for job in default_jobs(["din"], [], [0], [0], possible=possible)} == set(possible) - {
        "both_texts",
        "cf_both_texts",
    }
    with pytest.raises(InputError, match="arm 'paper' reads texts about users"):
        default_jobs(["din"], ["control", "paper"], [0], [0], possible=possible)


def test_an_initial_ranker_puts_lists_in_its_order_and_predictions_stay_in_theirs(work):
    data = encode_dataset(work.read(Dataset).split_by_user(fold=0, folds=2))
    given = KnowledgeInputs.for_training(ARMS["control"], data, samples_of_split(data, TRAIN), work, seed=0)
    torch.manual_seed(0)
    ranker = InitialRanker(new_model(Run("dcn", "control"), data, given, SETTINGS).eval(), given)
    lists = lists_of_split(data, TEST, seed=0)
    order = ranker.order(data, lists)
    assert sorted(order.tolist()) == list(range(len(lists)))
    one_by_one = torch.cat(
        [
            predict_logits(ranker.model, Batches(data, replace(lists.rows(row[None]), list_length=1), given))
            for row in torch.arange(len(lists))
        ]
    ).view(-1, 10)
    assert not torch.equal(order, torch.arange(len(lists)))
    for number, scores in enumerate(one_by_one.tolist()):
        expected = sorted(range(10), key=lambda at: -scores[at])
        assert [at - 10 * number for at in order[10 * number : 10 * number + 10].tolist()] == expected

    jobs = default_jobs(["dlcm"], ["control"], [0], [0], "dcn") + default_jobs(["dlcm"], ["control"], [0], [0])
    assert trained(work, jobs) == 2
    assert trained(work, jobs) == 0
    behind, alone = (np.load(job.folder(work, PROTOCOL, "encoding") / "predictions.npy") for job in jobs)
    assert behind.shape == alone.shape == (len(lists),)
    assert not np.array_equal(behind, alone)
    report = measured(work, PROTOCOL, "encoding", jobs[:1], resamples=20)
    labels = lists.label.view(-1, 10).numpy()
    assert report["rows"][0]["ranker"] == "dcn"
    assert report["rows"][0]["map"] == np.nanmean(average_precision(labels, behind.reshape(-1, 10), 10))
