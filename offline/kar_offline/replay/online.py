"""Owns the demo's measurement online: both arms on every slate, offline parity, latency, Triton's own counters."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.progress import track
from rich.table import Table

from kar_offline.dataset.dataset import Dataset
from kar_offline.evaluate.metrics import auc, paired_bootstrap
from kar_offline.replay.offline_scores import OfflineScorer
from kar_offline.replay.serving import ServingAddresses, serving
from kar_offline.replay.slates import Slate, slates
from kar_offline.work_folder import WorkFolder
from kar_sidecar.client import KarClient, Ranking
from kar_sidecar.errors import KarError, UnavailableError
from kar_sidecar.experiments.assignment import ARMS
from kar_sidecar.launcher.triton_process import read_metrics
from kar_sidecar.releases.manifest import Release, read_active

__all__ = ["SEED", "STAGES", "replay", "replay_release", "replay_table"]

STAGES: Final = ("assign", "fetch", "assemble", "score", "respond")
LEVELS: Final = ("full", "stale", "neighbour", "neutral")
TIMEOUT_S: Final = 10.0
ATTEMPTS: Final = 10
SEED: Final = 7
"""Of the sampled candidates and of the bootstrap online."""


def _inferences(addresses: ServingAddresses) -> int:
    """Inferences that all Triton models have made so far, from Triton's own counters."""
    metrics = read_metrics(addresses.triton_metrics)
    return int(sum(value for (name, _), value in metrics.items() if name == "nv_inference_count"))


@dataclass(frozen=True, slots=True)
class _Measured:
    """Labelled rows of all slates, and the largest difference between online and offline scores."""

    users: NDArray[np.int64]
    labels: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]]
    max_difference: float


def _rank(client: KarClient, dataset: Dataset, slate: Slate, arm: str = "") -> Ranking:
    return client.rank(dataset.users[slate.user].id, [dataset.items[row].id for row in slate.items], arm=arm)


def _undegraded(client: KarClient, dataset: Dataset, slate: Slate, arm: str) -> Ranking:
    """An answer of the best rung: on a busy machine one may be late, which is no answer to measure quality with."""
    for _ in range(ATTEMPTS):
        ranking = _rank(client, dataset, slate, arm)
        if not ranking.response.reason:
            return ranking
    raise UnavailableError(f"{ATTEMPTS} requests in a row were degraded, the last one since {ranking.response.reason}")


def _measure(
    client: KarClient, dataset: Dataset, traffic: Sequence[Slate], offline: OfflineScorer, console: Console
) -> _Measured:
    users, labels = [], []
    scores: dict[str, list[NDArray]] = {arm: [] for arm in ARMS}
    difference = 0.0
    for slate in track(traffic, "rank: both arms, every test user", console=console, transient=True):
        for arm in ARMS:
            online = np.array(_undegraded(client, dataset, slate, arm).response.scores, dtype=np.float32)
            difference = max(difference, float(np.abs(online - offline.score(slate, arm)).max()))
            scores[arm].append(online[: len(slate.labels)])
        users.append(np.full(len(slate.labels), slate.user))
        labels.append(slate.labels)
    joined = {arm: np.concatenate(parts) for arm, parts in scores.items()}
    return _Measured(np.concatenate(users), np.concatenate(labels), joined, difference)


def _percentiles(values_ms: Iterable[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(np.fromiter(values_ms, dtype=float), [50, 95, 99])
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}


def replay_release(
    work: WorkFolder, address: ServingAddresses | None, *, requests: int, candidates: int, seed: int, console: Console
) -> dict[str, Any]:
    """Measure the active release online (`replay`); without `address`, on a `kar serve` of its own.

    Raises:
        PreconditionError: an earlier stage is missing.
        UnavailableError: serving does not answer.
    """
    release = Release.load(work.releases, read_active(work.releases), verify=False)
    dataset = work.read(Dataset)
    served = release.model("knowledge")
    offline = OfflineScorer(dataset, served.backbone, work, served.recipe)
    with ExitStack() as stack:
        if address is None:
            with console.status("starting Triton and the sidecar"):
                address = stack.enter_context(serving(work))
        return replay(dataset, offline, address, requests=requests, candidates=candidates, seed=seed, console=console)


def replay(
    dataset: Dataset,
    offline: OfflineScorer,
    addresses: ServingAddresses,
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
    with KarClient(addresses.grpc, timeout_s=TIMEOUT_S) as client:
        measured = _measure(client, dataset, traffic, offline, console)
        before = _inferences(addresses)
        rungs, levels, arms = Counter[str](), Counter(dict.fromkeys(LEVELS, 0)), Counter[str]()
        errors, latencies_ms = 0, []
        stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for number in track(range(requests), "rank: latency", console=console, transient=True):
            began = time.perf_counter()
            try:
                ranking = _rank(client, dataset, traffic[number % len(traffic)])
            except KarError:
                errors += 1
                continue
            latencies_ms.append((time.perf_counter() - began) * 1e3)
            rungs[ranking.rung] += 1
            arms[ranking.arm] += 1
            levels.update(level for level in ranking.levels if level in LEVELS)
            for stage in STAGES:
                stages[stage].append(getattr(ranking.response.timings, f"{stage}_ms"))
        scored = _inferences(addresses) - before
    if not latencies_ms:
        raise UnavailableError(f"none of {requests} requests to {addresses.grpc} was answered: see the serving logs")
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
            "knowledge_minus_control": asdict(interval),
        },
        "serve": {
            "requests": requests,
            "errors": errors,
            "candidates": candidates,
            **_percentiles(latencies_ms),
            "stages": {stage: _percentiles(values) for stage, values in stages.items()},
            "levels": dict(levels),
            "rungs": dict(rungs),
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
        f"errors {serve['errors']}; requests by arm: {_counts(serve['arms'])}; by rung: {_counts(serve['rungs'])}",
        f"knowledge of users and items: {_counts(serve['levels'])}",
        f"Triton counted {serve['triton_inferences']:,} inferences",
    )


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
