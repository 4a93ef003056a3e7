"""The study of freshness: its report, no look ahead, and its command."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tests.support.event_logs import random_event_log, write_stages
from tests.support.work_folders import QUICK_TRAINING
from typer.testing import CliRunner

from kar_bench.command import bench
from kar_bench.harness import to_json
from kar_bench.studies.freshness.measure import measure_freshness
from kar_bench.studies.freshness.simulation import DAY_S, Month
from kar_bench.studies.freshness.study import FreshnessBenchmarkOptions, FreshnessVariant
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST
from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.evaluate.metrics import auc
from kar_offline.work_folder import WorkFolder

SMALL = FreshnessBenchmarkOptions(budgets=(2,), model="dcn", seeds=(0,), share=0.5, days=3)


def measure(work, options=SMALL):
    """The report as JSON."""
    return to_json(
        measure_freshness(work, "encoding", options, QUICK_TRAINING, HashingEncoder, workers=0, resamples=20)
    )


def test_the_report_tells_what_the_predictions_give_and_a_second_run_trains_nothing(tmp_path):
    work = write_stages(WorkFolder(tmp_path), random_event_log())
    notices = []
    report = to_json(
        measure_freshness(
            work,
            "encoding",
            SMALL,
            QUICK_TRAINING,
            HashingEncoder,
            workers=0,
            resamples=20,
            on_epoch=lambda *notice: notices.append(notice[1:]),
        )
    )
    assert notices[-1] == (0, 8, 8)
    assert [(e["arm"], e["budget"], e["loans"]) for e in report["summary"]] == [
        FreshnessVariant("control", 0, "never"),
        *(FreshnessVariant("knowledge", budget, "never") for budget in (0, 2, None)),
        FreshnessVariant("knowledge", 2, "served"),
        FreshnessVariant("knowledge", 2, "trained"),
        *(FreshnessVariant("paper", budget, "never") for budget in (0, 2, None)),
    ]
    month = Month.of(work.read(Dataset), share=0.5, days=3)
    labels = month.dataset.labels[month.dataset.samples(TEST)]
    folder = work.root / "freshness" / "3_days_from_0.5"
    for row in report["rows"]:
        name = f"dcn_{row['arm']}_{'any' if row['budget'] is None else row['budget']}"
        name += ("_on_loans" if row["loans"] == "trained" else "") + "_seed0"
        assert row["auc"] == auc(labels, np.load(folder / name / f"predictions_{row['loans']}.npy"))
    mean = {(e["arm"], e["budget"], e["loans"]): e["auc"] for e in report["summary"]}
    assert mean == {(row["arm"], row["budget"], row["loans"]): row["auc"] for row in report["rows"]}
    summary = {(e["arm"], e["budget"]): e for e in report["summary"] if e["loans"] == "never"}
    served = next(e for e in report["summary"] if e["loans"] == "served")
    assert served["levels"]["item"]["lent"] > 0
    assert served["levels"]["item"]["full"] == summary["knowledge", 2]["levels"]["item"]["full"] > 0
    assert summary["knowledge", 2]["levels"]["item"]["lent"] == 0
    budget_2 = summary["paper", 2]
    assert sum(budget_2["calls"].values()) <= 3 * 2
    assert budget_2["calls_before"] == 2 * month.first
    assert summary["paper", 0]["calls"] == {}
    assert summary["paper", 0]["usd"] == 0
    assert set(budget_2["minus"]) == {"control", "no_calls", "all_calls"}
    assert budget_2["minus"]["no_calls"]["mean"] == pytest.approx(budget_2["auc"] - summary["paper", 0]["auc"])
    assert summary["knowledge", None]["waiting"] == 0
    assert summary["knowledge", None]["levels"]["user"]["full"] == 0
    assert summary["paper", None]["levels"]["user"]["full"] > 0.5
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert measure(work) == report
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")} == times


def test_an_item_whose_released_text_was_refused_has_none_of_its_own(tmp_path):
    work = write_stages(WorkFolder(tmp_path), random_event_log(), refused=("i05",))
    report = measure(work, replace(SMALL, arms=("knowledge",), budgets=()))
    month = Month.of(work.read(Dataset), share=0.5, days=3)
    others = month.dataset.event_item[month.dataset.samples(TEST)] != 5
    [levels] = [e["levels"]["item"] for e in report["summary"] if e["arm"] == "knowledge" and e["budget"] is None]
    assert levels == {"full": others.mean(), "lent": 0, "neutral": (~others).mean()}
    assert others.mean() < 1


def test_the_scores_of_a_day_use_no_later_event(tmp_path):
    dataset = random_event_log()
    month = Month.of(dataset, share=0.5, days=3)
    last = (dataset.event_time - dataset.event_time.min()) // DAY_S >= month.end - 1
    rating = np.where(last, 6 - dataset.event_rating, dataset.event_rating)
    item = np.where(last, (dataset.event_item + 1) % 20, dataset.event_item)
    changed = replace(dataset, event_rating=rating.astype(np.float32), event_item=item.astype(np.int32))
    files = []
    for name, log in (("as_it_was", dataset), ("changed", changed)):
        measure(write_stages(WorkFolder(tmp_path / name), log))
        files.append(sorted((tmp_path / name / "freshness").rglob("predictions*.npy")))
    earlier = month.event_day[month.dataset.samples(TEST)] < month.end - 1
    assert 0 < earlier.sum() < len(earlier)
    assert len(files[0]) == 9
    for original_file, changed_file in zip(*files, strict=True):
        original_scores, changed_scores = np.load(original_file), np.load(changed_file)
        np.testing.assert_array_equal(original_scores[earlier], changed_scores[earlier])
        assert (original_scores[~earlier] != changed_scores[~earlier]).any()


def test_the_command_writes_json_and_a_picture(tmp_path):
    work = write_stages(WorkFolder(tmp_path / "work"), random_event_log())
    options = ["freshness", "--dataset", "prepared", "--work", str(work), "--model", "dcn", "--arm", "knowledge"]
    more = ["--budget", "2", "--share", "0.5", "--days", "3", "--seed", "0", "--epochs", "1", "--workers", "0"]
    out = ["--usd-per-million", "1", "2", "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.png")]
    done = CliRunner().invoke(bench, [*options, *more, *out], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "f.json").read_text())
    assert [entry["budget"] for entry in report["summary"]] == [0, 0, 2, None, 2, 2]
    spent = report["summary"][2]
    assert spent["usd"] == pytest.approx((spent["tokens_read"] + 2 * spent["tokens_written"]) / 1e6, abs=2e-6)
    assert "template-made" in done.output
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_arm_is_refused(tmp_path):
    done = CliRunner().invoke(bench, ["freshness", "--dataset", "prepared", "--work", str(tmp_path), "--arm", "cf"])
    assert done.exit_code != 0
    assert "arm 'cf' is not known" in str(done.exception)
