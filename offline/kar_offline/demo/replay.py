"""Owns the demo's measurement online: both arms on every slate, offline parity, latency, Triton's own counters."""

import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.request import urlopen

import grpc
import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.progress import track
from rich.table import Table

from kar.ranking.v1 import ranking_pb2, ranking_pb2_grpc
from kar.records.v1 import records_pb2
from kar_offline.dataset.samples import Dataset
from kar_offline.demo.offline_scores import OfflineScorer
from kar_offline.demo.traffic import Slate, slates
from kar_offline.evaluate.metrics import auc, paired_bootstrap
from kar_sidecar.errors import UnavailableError

__all__ = ["ServingAddresses", "replay", "replay_table", "triton_inferences"]

EXPERIMENT: Final = "knowledge"
ARMS: Final = ("control", "knowledge")
STAGES: Final = ("assign", "fetch", "assemble", "score", "respond")
TIMEOUT_S: Final = 10.0
ATTEMPTS: Final = 10


@dataclass(frozen=True, slots=True)
class ServingAddresses:
    """Where one `kar serve` answers."""

    grpc: str
    triton_metrics: str


@dataclass(slots=True)
class _Tally:
    rungs: Counter[str] = field(default_factory=Counter)
    entities: Counter[str] = field(default_factory=Counter)
    errors: int = 0

    def add(self, response: ranking_pb2.RankResponse) -> None:
        self.rungs[ranking_pb2.Rung.Name(response.rung).removeprefix("RUNG_").lower()] += 1
        for level in (response.user_level, *response.item_levels):
            if level != records_pb2.KNOWLEDGE_LEVEL_UNSPECIFIED:
                name = records_pb2.KnowledgeLevel.Name(level)
                self.entities[name.removeprefix("KNOWLEDGE_LEVEL_").lower()] += 1


def triton_inferences(metrics_address: str) -> int:
    """Inferences that all Triton models have made so far, from Triton's own Prometheus page.

    Raises:
        UnavailableError: the page does not answer.
    """
    try:
        with urlopen(f"http://{metrics_address}/metrics", timeout=TIMEOUT_S) as page:
            lines = page.read().decode().splitlines()
    except OSError as error:
        raise UnavailableError(f"Triton's metrics at {metrics_address} do not answer: {error}") from error
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("nv_inference_count{")))


def _request(dataset: Dataset, slate: Slate, arm: str | None) -> ranking_pb2.RankRequest:
    ids = [dataset.items[row].id for row in slate.items]
    return ranking_pb2.RankRequest(
        request_id=uuid.uuid4().hex,
        user=ranking_pb2.User(id=dataset.users[slate.user].id),
        candidates=ranking_pb2.Candidates(ids=ids),
        experiment_overrides={EXPERIMENT: arm} if arm else {},
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """Labelled rows of all slates, and the largest difference between online and offline scores."""

    users: NDArray[np.int64]
    labels: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]]
    max_difference: float


def _undegraded(
    stub: ranking_pb2_grpc.RankingServiceStub, request: ranking_pb2.RankRequest
) -> ranking_pb2.RankResponse:
    """An answer of the best rung: on a busy machine one may be late, which is no answer to measure quality with."""
    for _ in range(ATTEMPTS):
        response = stub.Rank(request, timeout=TIMEOUT_S)
        if not response.reason:
            return response
    raise UnavailableError(f"{ATTEMPTS} requests in a row were degraded, the last one since {response.reason}")


def _measure(
    stub: ranking_pb2_grpc.RankingServiceStub,
    dataset: Dataset,
    traffic: Sequence[Slate],
    offline: OfflineScorer,
    console: Console,
) -> _Measured:
    users, labels = [], []
    scores: dict[str, list[NDArray]] = {arm: [] for arm in ARMS}
    difference = 0.0
    for slate in track(traffic, "rank: both arms, every test user", console=console, transient=True):
        for arm in ARMS:
            response = _undegraded(stub, _request(dataset, slate, arm))
            online = np.array(response.scores, dtype=np.float32)
            difference = max(difference, float(np.abs(online - offline.score(slate, arm)).max()))
            scores[arm].append(online[: len(slate.labels)])
        users.append(np.full(len(slate.labels), slate.user))
        labels.append(slate.labels)
    joined = {arm: np.concatenate(parts) for arm, parts in scores.items()}
    return _Measured(np.concatenate(users), np.concatenate(labels), joined, difference)


def _percentiles(values_ms: Iterable[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(np.fromiter(values_ms, dtype=float), [50, 95, 99])
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}


def replay(
    dataset: Dataset,
    offline: OfflineScorer,
    serving: ServingAddresses,
    *,
    requests: int,
    candidates: int,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """Rank every test user's slate in both arms, then time `requests` requests with arms split by the user's hash.

    Returns:
        `online` (AUC of both arms on the labelled rows, their paired difference with its 95 % interval, the largest
        difference to offline scores) and `serve` (latency percentiles in ms as the client sees them, the server's
        stages, rungs, knowledge levels, inferences made by Triton).
    """
    traffic = list(slates(dataset, size=candidates, seed=seed))
    with grpc.insecure_channel(serving.grpc) as channel:
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        measured = _measure(stub, dataset, traffic, offline, console)
        before = triton_inferences(serving.triton_metrics)
        tally, latencies_ms, arms = _Tally(), [], Counter[str]()
        stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for number in track(range(requests), "rank: latency", console=console, transient=True):
            request = _request(dataset, traffic[number % len(traffic)], None)
            began = time.perf_counter()
            try:
                response = stub.Rank(request, timeout=TIMEOUT_S)
            except grpc.RpcError:
                tally.errors += 1
                continue
            latencies_ms.append((time.perf_counter() - began) * 1e3)
            tally.add(response)
            arms[response.arm] += 1
            for stage in STAGES:
                stages[stage].append(getattr(response.timings, f"{stage}_ms"))
        scored = triton_inferences(serving.triton_metrics) - before
    if not latencies_ms:
        raise UnavailableError(f"none of {requests} requests to {serving.grpc} was answered: see the serving logs")
    auc_by_arm = {arm: auc(measured.labels, measured.scores[arm]) for arm in ARMS}
    interval = paired_bootstrap(
        measured.labels, measured.scores["knowledge"], measured.scores["control"], measured.users, seed=seed
    )
    return {
        "online": {
            "users": len(traffic),
            "labelled_rows": len(measured.labels),
            "max_score_difference": measured.max_difference,
            "auc": auc_by_arm,
            "knowledge_minus_control": interval,
        },
        "serve": {
            "requests": requests,
            "errors": tally.errors,
            "candidates": candidates,
            **_percentiles(latencies_ms),
            "stages": {stage: _percentiles(values) for stage, values in stages.items()},
            "levels": dict(tally.rungs),
            "entity_levels": dict(tally.entities),
            "arms": dict(arms),
            "triton_inferences": scored,
        },
    }


def replay_table(report: Mapping[str, Any]) -> Group:
    """What `replay` measured, ready to print."""
    online, serve = report["online"], report["serve"]
    quality = Table(title=f"online: {online['labelled_rows']:,} labelled rows of {online['users']} test users")
    quality.add_column("arm")
    quality.add_column("AUC", justify="right")
    for arm, value in online["auc"].items():
        quality.add_row(arm, f"{value:.4f}")
    interval = online["knowledge_minus_control"]
    mean, low, high = (f"{interval[key]:+.4f}" for key in ("mean", "low", "high"))
    quality.add_row("knowledge - control", f"{mean} [{low}, {high}]")
    latency = Table(
        title=f"latency in ms, {serve['requests']:,} requests of {serve['candidates']} candidates, one client"
    )
    latency.add_column("stage")
    for percentile in ("p50", "p95", "p99"):
        latency.add_column(percentile, justify="right")
    rows = {**serve["stages"], "client sees": serve}
    for stage, values in rows.items():
        latency.add_row(stage, *(f"{values[f'{percentile}_ms']:.2f}" for percentile in ("p50", "p95", "p99")))
    return Group(
        quality,
        f"largest difference between online and offline scores: {online['max_score_difference']:.1e}",
        latency,
        f"errors {serve['errors']}; rungs {serve['levels']}; knowledge of users and items {serve['entity_levels']}; "
        f"arms {serve['arms']}; Triton counted {serve['triton_inferences']:,} inferences",
    )
