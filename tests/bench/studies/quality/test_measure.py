"""The report of the quality study follows from the predictions on disk."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tests.support.work_folders import QUICK_TRAINING

from kar.records.v1.records_pb2 import KnowledgeRecord
from kar_bench.harness import to_json
from kar_bench.splits import SplitProtocol
from kar_bench.studies.quality.folds import BUCKETS
from kar_bench.studies.quality.measure import measure_quality, train_jobs
from kar_bench.studies.quality.report import quality_table, write_quality_report
from kar_bench.studies.quality_runs import RUNGS, TrainingJob, default_jobs
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.rerank_lists import rerank_lists
from kar_offline.dataset.splits import TEST, TRAIN
from kar_offline.evaluate.metrics import auc, gauc
from kar_offline.evaluate.ranking import average_precision
from kar_offline.knowledge.records import write_knowledge
from kar_offline.train.arms import DEFAULT_ARMS
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM
from kar_sidecar.errors import PreconditionError

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


def test_rows_are_what_the_predictions_give_and_a_second_run_trains_nothing(work):
    jobs = default_jobs(["dcn"], [], [0, 1], [0])
    seen = []
    assert trained(work, jobs, seen) == 6
    assert {job for job, epoch in seen if epoch == 0} == set(jobs)
    assert trained(work, jobs) == 0
    report = measured(work, PROTOCOL, "encoding", jobs, resamples=50)
    dataset = work.read(Dataset)
    users = set()
    for row in report["rows"]:
        fold = dataset.split_by_user(fold=row["fold"], folds=2)
        events = fold.samples(TEST)
        users |= set(fold.event_user[events].tolist())
        rung = row["arm"] if row["arm"] in RUNGS else ""
        folder = TrainingJob("dcn", "knowledge" if rung else row["arm"], row["fold"], 0).folder(
            work, PROTOCOL, "encoding"
        )
        file = folder / (f"predictions_{rung}.npy" if rung else "predictions.npy")
        assert row["auc"] == auc(fold.labels[events], np.load(file))
        assert row["predictions_sha256"] == file_sha256(file)
        assert (row["interval"] is None) == (row["arm"] == "control")
    assert len(report["rows"]) == 2 * (3 + len(RUNGS))
    assert users == set(range(40))  # each user is tested once
    assert report["test"]["users"] == 40
    by_arm = {entry["arm"]: entry for entry in report["summary"]}
    mean = np.mean([row["auc"] for row in report["rows"] if row["arm"] == "knowledge"])
    assert by_arm["knowledge"]["auc"] == pytest.approx(mean)
    difference = by_arm["knowledge"]["minus"]["control"]
    assert difference["mean"] == pytest.approx(mean - by_arm["control"]["auc"])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert difference["p"] <= difference["p_holm"] <= 1
    assert set(by_arm["knowledge"]["minus"]) == {"control", "raw_text"}
    assert set(by_arm) == {*DEFAULT_ARMS, "neutral"}
    assert set(by_arm["neutral"]["minus"]) == {"control"}
    json.dumps(report)


def test_a_killed_run_goes_on(work):
    jobs = default_jobs(["dcn", "deepfm"], ["control", "statistics"], [0], [0])

    class Killed(Exception):
        pass

    def kill(job, epoch):
        if job == jobs[2] and epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        train_jobs(work, PROTOCOL, "encoding", jobs, SETTINGS, workers=0, on_epoch=kill)
    assert trained(work, jobs) == 2
    measured(work, PROTOCOL, "encoding", jobs, resamples=10)


def test_a_comparison_of_equal_predictions_is_no_difference(work):
    jobs = default_jobs(["dcn"], ["control", "statistics"], [0], [0])
    trained(work, jobs)
    folders = {job.arm: job.folder(work, PROTOCOL, "encoding") for job in jobs}
    scores = np.load(folders["control"] / "predictions.npy")
    np.save(folders["statistics"] / "predictions.npy", scores)
    report = measured(work, PROTOCOL, "encoding", jobs, resamples=100)
    [entry] = [entry for entry in report["summary"] if entry["arm"] == "statistics"]
    assert entry["minus"]["control"] == {"mean": 0, "low": 0, "high": 0, "p": 1, "p_holm": 1}
    labels = work.read(Dataset).split_by_user(fold=0, folds=2)
    events = labels.samples(TEST)
    np.save(folders["statistics"] / "predictions.npy", labels.labels[events] * 0.5 + 0.25)  # knows the answer
    [better] = [e for e in measured(work, PROTOCOL, "encoding", jobs)["summary"] if e["arm"] == "statistics"]
    assert better["auc"] == 1
    [first] = [e for e in measured(work, PROTOCOL, "encoding", jobs)["summary"] if e["arm"] == "control"]
    assert first["auc"] < 0.9
    assert better["minus"]["control"]["p_holm"] < 0.01


def test_rerankers_are_measured_on_lists(work):
    jobs = default_jobs(["setrank"], [], [0, 1], [0])
    trained(work, jobs)
    report = measured(work, PROTOCOL, "encoding", jobs, resamples=50)
    dataset = work.read(Dataset)
    for row in (row for row in report["rows"] if row["arm"] not in RUNGS):
        lists = rerank_lists(dataset.split_by_user(fold=row["fold"], folds=2), TEST, seed=0)
        scores = np.load(
            TrainingJob("setrank", row["arm"], row["fold"], 0).folder(work, PROTOCOL, "encoding") / "predictions.npy"
        )
        precision = average_precision(lists.label, scores.reshape(-1, 10), 10)
        assert row["map"] == pytest.approx(np.nanmean(precision))
        assert set(row["at"]) == {"1", "3", "5", "7"}
    [entry] = [entry for entry in report["summary"] if entry["arm"] == "knowledge"]
    assert entry["minus"]["control"]["low"] <= entry["minus"]["control"]["mean"] <= entry["minus"]["control"]["high"]
    assert {entry["arm"] for entry in report["summary"]} == {*DEFAULT_ARMS, *RUNGS}
    assert report["breakdowns"] == []


def test_breakdowns_cover_every_sample_once(work):
    jobs = default_jobs(["dcn"], ["control"], [0, 1], [0])
    trained(work, jobs)
    work.knowledge.mkdir()
    write_knowledge(work.knowledge, [KnowledgeRecord(id="i03", entity=ITEM.number, text="A film.", confidence="low")])
    report = measured(work, PROTOCOL, "encoding", jobs, resamples=10)
    by = {name: [entry for entry in report["breakdowns"] if entry["by"] == name] for name in (*BUCKETS, "confidence")}
    for buckets in by.values():
        assert sum(entry["samples"] for entry in buckets) == report["test"]["samples"]
        assert all(math.isnan(entry["auc"]) or 0 <= entry["auc"] <= 1 for entry in buckets)
    dataset = work.read(Dataset)
    tested = [dataset.split_by_user(fold=fold, folds=2).samples(TEST) for fold in range(2)]
    about = sum((dataset.event_item[events] == 3).sum() for events in tested)
    assert {entry["bucket"]: entry["samples"] for entry in by["confidence"]}["low"] == about
    assert [entry["bucket"] for entry in by["user_events"]] == ["0 to 50"]


def test_a_bucket_of_one_fold_has_the_metrics_of_its_rows(work):
    [job] = jobs = default_jobs(["dcn"], ["control"], [0], [0])
    trained(work, jobs)
    report = measured(work, PROTOCOL, "encoding", jobs, resamples=10)
    fold = work.read(Dataset).split_by_user(fold=0, folds=2)
    events = fold.samples(TEST)
    scores = np.load(job.folder(work, PROTOCOL, "encoding") / "predictions.npy")
    seen = np.bincount(fold.event_item[fold.event_split == TRAIN], minlength=30)[fold.event_item[events]]
    here = (seen >= 6) & (seen <= 20)
    [entry] = [e for e in report["breakdowns"] if (e["by"], e["bucket"]) == ("item_ratings", "6 to 20")]
    assert entry["samples"] == here.sum()
    assert entry["auc"] == auc(fold.labels[events][here], scores[here])
    assert entry["gauc"] == gauc(fold.labels[events][here], scores[here], fold.event_user[events][here])


def test_the_page_and_the_table_stand_gaps(work, tmp_path):
    jobs = default_jobs(["din"], ["statistics"], [0], [0])
    trained(work, jobs)
    report = measure_quality(work, PROTOCOL, "encoding", jobs, resamples=10)
    write_quality_report(report, tmp_path / "q.html")
    assert "statistics" in (tmp_path / "q.html").read_text()
    assert quality_table(report).renderables


def test_a_fold_without_users_is_refused_before_training(work):
    dataset, folds = work.read(Dataset), 500
    empty = next(f for f in range(folds) if not len(dataset.split_by_user(fold=f, folds=folds).samples(TEST)))
    jobs = default_jobs(["dcn"], ["control"], [empty], [0])
    with pytest.raises(PreconditionError, match=f"fold {empty} has no test samples"):
        train_jobs(
            work, SplitProtocol("user", folds), "encoding", jobs, SETTINGS, workers=0, on_epoch=lambda job, epoch: None
        )
    assert not (work.root / "quality").exists()


def test_a_share_of_the_training_users_is_a_protocol_of_its_own(work):
    jobs = default_jobs(["dcn"], ["control"], [0], [0])
    less = SplitProtocol("user", 2, 0.5)
    for protocol in (PROTOCOL, less):
        train_jobs(work, protocol, "encoding", jobs, SETTINGS, workers=0, on_epoch=lambda job, epoch: None)
    all_users, half = (measured(work, protocol, "encoding", jobs, resamples=10) for protocol in (PROTOCOL, less))
    assert half["split"] == "user2_share0.5"
    assert half["test"] == all_users["test"]
    assert half["rows"][0]["predictions_sha256"] != all_users["rows"][0]["predictions_sha256"]
