"""Owns the two measurements of a replay: the quality of both arms on every slate, and the latency of timed requests."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from rich.console import Console
from rich.progress import track

from kar_offline.dataset.dataset import Dataset
from kar_offline.evaluate.metrics import auc, paired_bootstrap
from kar_offline.replay.offline_scores import OfflineScorer
from kar_offline.replay.report import STAGES, OnlineQuality, Percentiles, ServingMeasurement
from kar_offline.replay.serving import ServingAddresses
from kar_offline.replay.slates import Slate
from kar_sidecar.client import KarClient, Ranking
from kar_sidecar.errors import KarError, UnavailableError
from kar_sidecar.experiments.assignment import ARMS, CONTROL, KNOWLEDGE
from kar_sidecar.launcher.triton_process import read_metrics

__all__ = ["TIMEOUT_S", "measure_latency", "measure_quality"]

LEVELS: Final = ("full", "stale", "neighbour", "neutral")
TIMEOUT_S: Final = 10.0
"""Time limit of a request."""
ATTEMPTS: Final = 10
"""Attempts to get an answer of the best rung."""


def measure_quality(
    client: KarClient,
    dataset: Dataset,
    slates: Sequence[Slate],
    offline: OfflineScorer,
    *,
    seed: int,
    console: Console,
) -> OnlineQuality:
    """Rank every slate in both arms, and compare the scores with labels and with offline scores.

    Args:
        client: A client of the sidecar.
        dataset: The dataset of the slates.
        slates: One slate per test user.
        offline: Scores the same slates offline.
        seed: Seed of the bootstrap.
        console: Shows progress.

    Raises:
        UnavailableError: the sidecar does not answer, or degrades every attempt of a request.
    """
    users, labels = [], []
    scores: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    max_difference = 0.0
    for slate in track(slates, "rank: both arms, every test user", console=console, transient=True):
        for arm in ARMS:
            online = np.array(_rank_undegraded(client, dataset, slate, arm).response.scores, dtype=np.float32)  # (C,)
            max_difference = max(max_difference, float(np.abs(online - offline.score(slate, arm)).max()))
            scores[arm].append(online[: len(slate.labels)])
        users.append(np.full(len(slate.labels), slate.user))
        labels.append(slate.labels)
    all_users, all_labels = np.concatenate(users), np.concatenate(labels)
    all_scores = {arm: np.concatenate(parts) for arm, parts in scores.items()}
    return OnlineQuality(
        users=len(slates),
        labelled_rows=len(all_labels),
        max_score_difference=max_difference,
        auc={arm: auc(all_labels, all_scores[arm]) for arm in ARMS},
        knowledge_minus_control=paired_bootstrap(
            all_labels, all_scores[KNOWLEDGE], all_scores[CONTROL], all_users, seed=seed
        ),
    )


def measure_latency(
    client: KarClient,
    dataset: Dataset,
    slates: Sequence[Slate],
    addresses: ServingAddresses,
    *,
    requests: int,
    candidates: int,
    console: Console,
) -> ServingMeasurement:
    """Time requests, one after the other; each user's hash chooses the arm.

    Args:
        client: A client of the sidecar.
        dataset: The dataset of the slates.
        slates: Slates, which are sent in turn.
        addresses: Addresses of the sidecar and of Triton's metrics.
        requests: Number of requests.
        candidates: Number of candidates of each slate, for the report.
        console: Shows progress.

    Raises:
        UnavailableError: no request was answered.
    """
    inferences_before = _triton_inferences(addresses)
    rungs, levels, arms = Counter[str](), Counter(dict.fromkeys(LEVELS, 0)), Counter[str]()
    latencies_ms: list[float] = []
    stages_ms: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for number in track(range(requests), "rank: latency", console=console, transient=True):
        began = time.perf_counter()
        try:
            ranking = _rank(client, dataset, slates[number % len(slates)])
        except KarError:
            continue
        latencies_ms.append((time.perf_counter() - began) * 1e3)
        rungs[ranking.rung] += 1
        arms[ranking.arm] += 1
        levels.update(level for level in ranking.levels if level in LEVELS)
        for stage in STAGES:
            stages_ms[stage].append(getattr(ranking.response.timings, f"{stage}_ms"))
    inferences = _triton_inferences(addresses) - inferences_before
    if not latencies_ms:
        raise UnavailableError(f"none of {requests} requests to {addresses.grpc} was answered: see the serving logs")
    client_sees = _percentiles(latencies_ms)
    return ServingMeasurement(
        requests=requests,
        errors=requests - len(latencies_ms),
        candidates=candidates,
        p50_ms=client_sees.p50_ms,
        p95_ms=client_sees.p95_ms,
        p99_ms=client_sees.p99_ms,
        stages={stage: _percentiles(values) for stage, values in stages_ms.items()},
        levels=dict(levels),
        rungs=dict(rungs),
        arms=dict(arms),
        triton_inferences=inferences,
    )


def _rank(client: KarClient, dataset: Dataset, slate: Slate, arm: str = "") -> Ranking:
    return client.rank(dataset.users[slate.user].id, [dataset.items[row].id for row in slate.items], arm=arm)


def _rank_undegraded(client: KarClient, dataset: Dataset, slate: Slate, arm: str) -> Ranking:
    """An answer of the best rung. Degraded answers are requested again: they say nothing about quality."""
    for _ in range(ATTEMPTS):
        ranking = _rank(client, dataset, slate, arm)
        if not ranking.response.reason:
            return ranking
    raise UnavailableError(f"{ATTEMPTS} requests in a row were degraded, the last because {ranking.response.reason}")


def _triton_inferences(addresses: ServingAddresses) -> int:
    """Inferences of all Triton models until now, by Triton's own counters."""
    metrics = read_metrics(addresses.triton_metrics)
    return int(sum(value for (name, _), value in metrics.items() if name == "nv_inference_count"))


def _percentiles(values_ms: Iterable[float]) -> Percentiles:
    return Percentiles(*map(float, np.percentile(np.fromiter(values_ms, dtype=float), [50, 95, 99])))
