"""Collective knowledge: imputed vectors, the variants that are measured, and paired differences."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from tests.support.work_folders import QUICK_TRAINING
from typer.testing import CliRunner

from kar_bench.command import bench
from kar_bench.harness import to_json
from kar_bench.splits import SplitProtocol
from kar_bench.studies.collective.measure import (
    OWN,
    WAYS,
    CollectiveBenchmarkOptions,
    CollectiveVariant,
    WayToShare,
    measure_collective,
    variants,
    write_imputed_vectors,
)
from kar_bench.studies.quality_runs import TrainingJob
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.metrics import auc
from kar_offline.generate.collective import HEAD
from kar_offline.knowledge.imputation import NEIGHBOURS
from kar_offline.prompts import Prompt

SMALL = CollectiveBenchmarkOptions(arms=("knowledge",), shares=(0.2,), model="dcn", folds=2)


@pytest.fixture
def prompted(work):
    """The work folder with prompts about all items and users."""
    work.prompts.mkdir()
    with (work.prompts / "prompts.jsonl").open("w") as file:
        for kind, count in (("item", 30), ("user", 40)):
            for number in range(count):
                id_ = f"i{number:02}" if kind == "item" else f"u{number}"
                prompt = Prompt(
                    id=id_,
                    kind="factual" if kind == "item" else "reasoning",
                    entity=kind,
                    template="t/1",
                    prompt="?",
                    prompt_sha256="0",
                    history_cutoff=0,
                    raw_text=f"film {number}",
                    title="",
                    context={},
                    expires_after_days=None,
                    expires_on=None,
                )
                file.write(json.dumps(asdict(prompt)) + "\n")
    return work


def vectors(folder, kind="item"):
    return np.load(folder / f"knowledge_{kind}.npy")


def test_the_variants():
    found = variants(CollectiveBenchmarkOptions(shares=(0.3, 0.1)))
    assert found[:3] == [
        CollectiveVariant("control", 0, OWN),
        CollectiveVariant("raw_text", 0, OWN),
        CollectiveVariant("knowledge", 1, OWN),
    ]
    ways = {way: [line.share for line in found if (line.arm, line.way) == ("knowledge", way)] for way in WAYS}
    assert ways == {way: [0.3, 0.1] for way in WAYS}
    assert [(line.share, line.way) for line in found if line.arm == "both_texts"] == [
        (1, OWN),
        (0.3, "head"),
        (0.1, "head"),
    ]
    assert WAYS["head"] == WayToShare(HEAD, NEIGHBOURS)  # what `kar generate --share` does
    assert len(set(found)) == len(found)


def test_with_one_neighbour_every_vector_is_a_medoids(prompted):
    line = CollectiveVariant("knowledge", 0.2, "nearest")
    calls = write_imputed_vectors(prompted, "encoding", line, 0)
    assert calls == {"item": 6, "user": 8}
    own, imputed = vectors(prompted.encoding), vectors(prompted.root / line.encodings("encoding", 0))
    own = own / np.linalg.norm(own, axis=1, keepdims=True)
    imputed = imputed / np.linalg.norm(imputed, axis=1, keepdims=True)
    nearest = (imputed @ own.T).argmax(1)
    np.testing.assert_allclose(imputed, own[nearest], atol=1e-6)
    assert len(np.unique(nearest)) == 6
    # Medoids stay where they are.
    assert (nearest[np.unique(nearest)] == np.unique(nearest)).all()


def test_an_imputed_vector_is_not_an_own_one(prompted):
    header = prompted.encoding / "knowledge_item.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"lent": ["i03"]}))
    line = CollectiveVariant("knowledge", 1.0, "nearest")
    write_imputed_vectors(prompted, "encoding", line, 0)
    folder = prompted.root / line.encodings("encoding", 0)
    about = json.loads((folder / "knowledge_item.json").read_text())
    assert [at for at, digest in enumerate(about["text_sha256"]) if digest is None] == [3]
    assert "lent" not in about
    assert np.flatnonzero(~vectors(folder).any(1)).tolist() == [3]


def test_the_head_keeps_its_vectors(prompted):
    line = CollectiveVariant("knowledge", 0.2, "head")
    write_imputed_vectors(prompted, "encoding", line, 0)
    own, imputed = vectors(prompted.encoding), vectors(prompted.root / line.encodings("encoding", 0))
    same = np.isclose(own, imputed).all(1)
    dataset = prompted.read(Dataset)
    shown = np.concatenate([dataset.event_item[dataset.prompt_events(row)] for row in range(40)])
    often = np.argsort(-np.bincount(shown, minlength=30), kind="stable")[: int(HEAD * 6)]
    assert same[often].all()
    assert same.sum() <= 6
    np.testing.assert_allclose(np.linalg.norm(imputed[~same], axis=1), 1, atol=1e-6)


def test_the_raw_texts_vectors_come_along(prompted):
    line = CollectiveVariant("both_texts", 0.2, "head")
    write_imputed_vectors(prompted, "encoding", line, 0)
    for name in ("raw_item.npy", "raw_item.json", "knowledge_item.json"):
        assert (prompted.root / line.encodings("encoding", 0) / name).read_bytes() == (
            prompted.encoding / name
        ).read_bytes()


def measured(work, notices):
    """The report of `SMALL`; `notices` gets what `on_epoch` is called with."""
    return measure_collective(
        work,
        "encoding",
        SMALL,
        QUICK_TRAINING,
        workers=0,
        resamples=20,
        on_epoch=lambda *notice: notices.append(notice),
    )


def test_rows_are_what_the_predictions_give_and_a_second_run_trains_nothing(prompted):
    notices = []
    report = to_json(
        measure_collective(
            prompted,
            "encoding",
            SMALL,
            QUICK_TRAINING,
            workers=0,
            resamples=20,
            on_epoch=lambda *notice: notices.append(notice),
        )
    )
    assert notices[-1][1:] == (0, 12, 12)
    assert len(report["rows"]) == 12
    dataset = prompted.read(Dataset)
    for row in report["rows"]:
        fold = dataset.split_by_user(fold=row["fold"], folds=2)
        events = fold.samples(TEST)
        line = CollectiveVariant(row["arm"], row["share"], row["way"])
        job = TrainingJob("dcn", row["arm"], row["fold"], 0)
        folder = job.folder(prompted, SplitProtocol("user", 2), line.encodings("encoding", 0))
        assert row["auc"] == auc(fold.labels[events], np.load(folder / "predictions.npy"))
    summary = {(e["arm"], e["share"], e["way"]): e for e in report["summary"]}
    assert [e["item_calls"] for e in report["summary"]] == [0, 0, 30, 6, 6, 6]
    imputed = summary["knowledge", 0.2, "head"]
    assert set(imputed["minus"]) == {"control", "raw_text", "all_calls"}
    assert set(summary["knowledge", 1, OWN]["minus"]) == {"control", "raw_text"}
    assert summary["control", 0, OWN]["minus"] == {}
    difference = imputed["minus"]["all_calls"]
    assert difference["mean"] == pytest.approx(imputed["auc"] - summary["knowledge", 1, OWN]["auc"])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert report["test_users"] == 40
    again = []
    repeated = measure_collective(
        prompted,
        "encoding",
        SMALL,
        QUICK_TRAINING,
        workers=0,
        resamples=20,
        on_epoch=lambda *notice: again.append(notice[1]),
    )
    assert set(again) == {0}
    assert to_json(repeated) == report


def test_the_command_writes_json_and_a_picture(prompted, tmp_path):
    options = ["collective", "--dataset", "prepared", "--work", str(prompted), "--model", "dcn", "--folds", "2"]
    more = ["--share", "0.2", "--epochs", "1", "--workers", "0", "--json", str(tmp_path / "c.json")]
    done = CliRunner().invoke(bench, [*options, *more, "--plot", str(tmp_path / "c.png")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "c.json").read_text())
    assert {entry["way"] for entry in report["summary"]} == {OWN, *WAYS}
    assert "both_texts" in done.output
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_reranker_is_refused(prompted):
    refused = CliRunner().invoke(
        bench, ["collective", "--dataset", "prepared", "--work", str(prompted), "--model", "prm"]
    )
    assert refused.exit_code != 0
    assert "model 'prm' is not known" in str(refused.exception)
