"""The command of the quality study: its files, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from tests.support.work_folders import QUICK_TRAINING
from typer.testing import CliRunner

from kar_bench.command import bench
from kar_bench.harness import to_json
from kar_bench.splits import SplitProtocol
from kar_bench.studies.quality.folds import BUCKETS
from kar_bench.studies.quality.measure import measure_quality
from kar_bench.studies.quality_runs import RUNGS
from kar_sidecar.errors import InputError

SETTINGS = replace(QUICK_TRAINING, epochs=2)
PROTOCOL = SplitProtocol("user", 2)


def measured(*arguments, **options):
    """The report as JSON."""
    return to_json(measure_quality(*arguments, **options))


def test_the_command_writes_json_and_page(work, tmp_path):
    before = torch.get_num_threads()
    options = [
        "--dataset",
        "prepared",
        "--work",
        str(work),
        "--model",
        "dcnv2",
        "--arm",
        "control",
        "--arm",
        "knowledge",
    ]
    more = ["--folds", "2", "--epochs", "1", "--workers", "0", "--json", str(tmp_path / "q.json")]
    done = CliRunner().invoke(bench, ["quality", *options, *more, "--html", str(tmp_path / "q.html")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "q.json").read_text())
    assert {(row["model"], row["arm"], row["fold"]) for row in report["rows"]} == {
        ("dcnv2", arm, fold) for arm in ("control", "knowledge", *RUNGS) for fold in (0, 1)
    }
    assert report["trained"] == 4
    page = (tmp_path / "q.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + len(BUCKETS)
    assert "http" not in page.replace("http-equiv", "")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "options",
    [
        ["--split", "time", "--share", "0.5"],
        ["--split", "time", "--fold", "0"],
        ["--model", "perceptron"],
        ["--arm", "magic"],
        ["--fold", "7"],
        ["--dataset", "ml-1m"],
        ["--dataset", "x"],
    ],
)
def test_refusals(tmp_path, options):
    done = CliRunner().invoke(bench, ["quality", "--work", str(tmp_path), *options])
    assert done.exit_code != 0
    assert type(done.exception).__name__ == "InputError"


def test_a_work_folder_is_of_one_dataset(work):
    refused = CliRunner().invoke(bench, ["quality", "--work", str(work)])
    assert isinstance(refused.exception, InputError)
    assert "name another folder for ml-100k with --work" in str(refused.exception)


def test_what_is_asked_twice_is_trained_once(work):
    options = ["quality", "--dataset", "prepared", "--work", str(work), "--folds", "2", "--fold", "0", "--fold", "0"]
    twice = ["--model", "dcn", "--model", "dcn", "--arm", "control", "--arm", "control", "--seed", "1", "--seed", "1"]
    done = CliRunner().invoke(bench, [*options, *twice, "--epochs", "1", "--workers", "0"])
    assert done.exit_code == 0, done.output
    assert len(list((work.root / "quality").rglob("predictions.npy"))) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--ranker", "prm"], "ranker 'prm' is not known"), (["--ranker", "dcn", "--model", "din"], "din takes no order")],
)
def test_a_ranker_is_checked(tmp_path, options, said):
    refused = CliRunner().invoke(bench, ["quality", "--dataset", "prepared", "--work", str(tmp_path), *options])
    assert isinstance(refused.exception, InputError)
    assert said in str(refused.exception)
