"""Owns the report of a replay, and the tables that print it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from rich.console import Group
from rich.table import Table

from kar_offline.evaluate.metrics import Interval

__all__ = ["STAGES", "OnlineQuality", "Percentiles", "ReplayReport", "ServingMeasurement", "replay_table"]

STAGES: Final = ("assign", "fetch", "assemble", "score", "respond")
"""Stages of a request in the sidecar."""
PERCENTILES: Final = ("p50_ms", "p95_ms", "p99_ms")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of a duration, in milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class OnlineQuality:
    """Quality of the online scores on the labelled candidates of all test users."""

    users: int
    labelled_rows: int
    max_score_difference: float
    """Largest absolute difference between an online and an offline score."""
    auc: Mapping[str, float]
    """By arm."""
    knowledge_minus_control: Interval
    """Paired difference of AUC."""


@dataclass(frozen=True, slots=True)
class ServingMeasurement:
    """Latency and outcomes of timed requests."""

    requests: int
    errors: int
    """Requests without an answer."""
    candidates: int
    """Candidates of each request."""
    p50_ms: float
    """Percentiles of the latency that the client sees, in milliseconds."""
    p95_ms: float
    p99_ms: float
    stages: Mapping[str, Percentiles]
    """Durations of the sidecar's stages."""
    levels: Mapping[str, int]
    """Users and items by knowledge level."""
    rungs: Mapping[str, int]
    """Requests by rung of the fallback ladder."""
    arms: Mapping[str, int]
    """Requests by arm."""
    triton_inferences: int
    """Inferences that Triton counted during these requests."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """The measurements of a replay."""

    online: OnlineQuality
    serve: ServingMeasurement


def replay_table(report: ReplayReport) -> Group:
    """A report, ready to print."""
    online, serve = report.online, report.serve
    return Group(
        _quality_table(online),
        f"largest difference between online and offline scores: {online.max_score_difference:.1e}",
        _latency_table(serve),
        f"errors {serve.errors}; requests by arm: {_counts(serve.arms)}; by rung: {_counts(serve.rungs)}",
        f"knowledge of users and items: {_counts(serve.levels)}",
        f"Triton counted {serve.triton_inferences:,} inferences",
    )


def _quality_table(online: OnlineQuality) -> Table:
    table = Table(title=f"online: {online.labelled_rows:,} labelled rows of {online.users} test users")
    table.add_column("arm")
    table.add_column("AUC", justify="right")
    for arm, value in online.auc.items():
        table.add_row(arm, f"{value:.4f}")
    difference = online.knowledge_minus_control
    table.add_row("knowledge - control", f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]")
    return table


def _latency_table(serve: ServingMeasurement) -> Table:
    table = Table(title=f"latency in ms, {serve.requests:,} requests of {serve.candidates} candidates, one client")
    table.add_column("stage")
    for percentile in PERCENTILES:
        table.add_column(percentile.removesuffix("_ms"), justify="right")
    client_sees = Percentiles(serve.p50_ms, serve.p95_ms, serve.p99_ms)
    for stage, values in {**serve.stages, "client sees": client_sees}.items():
        table.add_row(stage, *(f"{getattr(values, percentile):.2f}" for percentile in PERCENTILES))
    return table


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
