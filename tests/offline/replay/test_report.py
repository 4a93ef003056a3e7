"""The report of a replay keeps the keys that summary.json has, and its tables show its figures."""

from dataclasses import asdict

import pytest
from rich.console import Console

from kar_offline.evaluate.metrics import Interval
from kar_offline.replay.report import (
    STAGES,
    OnlineQuality,
    Percentiles,
    ReplayReport,
    ServingMeasurement,
    replay_table,
)

pytestmark = pytest.mark.unit

REPORT = ReplayReport(
    OnlineQuality(189, 15000, 3.1e-7, {"control": 0.7512, "knowledge": 0.7498}, Interval(-0.0014, -0.0042, 0.0011)),
    ServingMeasurement(
        requests=1000,
        errors=2,
        candidates=100,
        p50_ms=3.21,
        p95_ms=4.32,
        p99_ms=6.54,
        stages=dict.fromkeys(STAGES, Percentiles(0.25, 0.5, 0.75)),
        levels={"full": 50000},
        rungs={"knowledge": 503, "backbone": 495},
        arms={"knowledge": 503, "control": 495},
        triton_inferences=1998,
    ),
)


def test_its_keys_are_those_of_the_summary() -> None:
    report = asdict(REPORT)
    assert list(report) == ["online", "serve"]
    assert list(report["online"]) == [
        *("users", "labelled_rows", "max_score_difference", "auc", "knowledge_minus_control"),
    ]
    assert report["online"]["knowledge_minus_control"] == {"mean": -0.0014, "low": -0.0042, "high": 0.0011}
    assert list(report["serve"]) == [
        *("requests", "errors", "candidates", "p50_ms", "p95_ms", "p99_ms", "stages", "levels", "rungs", "arms"),
        "triton_inferences",
    ]
    assert report["serve"]["stages"]["fetch"] == {"p50_ms": 0.25, "p95_ms": 0.5, "p99_ms": 0.75}


def test_its_tables_show_every_figure() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(replay_table(REPORT))
    shown = capture.get()
    for figure in ("15,000 labelled rows of 189", "-0.0014 [-0.0042, +0.0011]", "3.1e-07", "6.54", "0.25", "1,998"):
        assert figure in shown
    assert "errors 2; requests by arm: knowledge 503, control 495; by rung: knowledge 503, backbone 495" in shown
