"""Owns the sidecar's Prometheus metrics: their names, labels and buckets."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from kar.ranking.v1 import ranking_pb2
from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["Telemetry"]

STAGES: Final = ("assign", "fetch", "assemble", "score", "respond", "total")
BUCKETS_MS: Final = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 250, 500, 1000)
LEVELS: Final = records_pb2.KnowledgeLevel.keys()
STALE: Final = int(records_pb2.KNOWLEDGE_LEVEL_STALE)
NEUTRAL: Final = int(records_pb2.KNOWLEDGE_LEVEL_NEUTRAL)
ENTITIES: Final = (*EntityKind, "history")
"""Values of the label `entity`: "history" stands for the items that the user rated."""
AGES_HOURS: Final = (1, 6, 24, 72, 168, 336, 720, 2160, 4320, 8760)
"""Bucket bounds, from an hour to a year."""
HOUR_MS: Final = 3_600_000


class _Ages(Collector):
    """A histogram by entity that observes all values of a request in one call."""

    def __init__(self, name: str, documentation: str, entities: Sequence[str]) -> None:
        self._name, self._documentation = name, documentation
        self._counts = {entity: np.zeros(len(AGES_HOURS) + 1, np.int64) for entity in entities}
        self._sums = dict.fromkeys(entities, 0.0)

    def observe(self, entity: str, hours: NDArray[np.float64]) -> None:
        """Count ages [n]."""
        self._counts[entity] += np.bincount(np.searchsorted(AGES_HOURS, hours), minlength=len(AGES_HOURS) + 1)
        self._sums[entity] += float(hours.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See `Collector`."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=["entity"])
        bounds = [*(str(float(hours)) for hours in AGES_HOURS), "+Inf"]
        for entity, counts in self._counts.items():
            buckets = list(zip(bounds, counts.cumsum().tolist(), strict=True))
            family.add_metric([entity], buckets=buckets, sum_value=self._sums[entity])
        yield family


class Telemetry:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        """Create every metric, so that the first scrape shows all of them."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "kar_requests",
            "Requests; rung and arm only for Rank.",
            ("rpc", "status", "rung", "arm"),
            registry=self.registry,
        )
        self._latency = Histogram(
            "kar_request_milliseconds",
            "Time of whole requests in the server.",
            ("rpc",),
            buckets=BUCKETS_MS,
            registry=self.registry,
        )
        stages = Histogram(
            "kar_stage_milliseconds",
            "Time of each stage of Rank.",
            ("stage",),
            buckets=BUCKETS_MS,
            registry=self.registry,
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        levels = Counter(
            "kar_knowledge_levels",
            "Entities in Rank and BatchGetKnowledge by knowledge level.",
            ("entity", "level"),
            registry=self.registry,
        )
        self._levels = {entity: [levels.labels(entity, _short(level)) for level in LEVELS] for entity in EntityKind}
        expired = Counter(
            "kar_knowledge_expired", "Knowledge vectors served past their expiry.", ("entity",), registry=self.registry
        )
        self._expired = {entity: expired.labels(entity) for entity in ENTITIES}
        self._ages = _Ages("kar_knowledge_age_hours", "Age of the knowledge vectors served.", ENTITIES)
        self.registry.register(self._ages)
        self._missing = Counter(
            "kar_missing_values", "Numeric features that were absent, NaN or infinite.", registry=self.registry
        )
        self._failures = Counter(
            "kar_backend_failures",
            "Failed or unanswered calls of a backend.",
            ("backend",),
            registry=self.registry,
        )
        self.serving = Gauge("kar_serving", "1 while health reports SERVING.", registry=self.registry)

    def request(self, rpc: str, status: str, latency_ms: float, response: Message | None) -> None:
        """Count one finished call."""
        rung = arm = ""
        if isinstance(response, ranking_pb2.RankResponse):
            rung, arm = _short(ranking_pb2.Rung.Name(response.rung)), response.arm
        self._requests.labels(rpc, status, rung, arm).inc()
        self._latency.labels(rpc).observe(latency_ms)

    def ranked(self, response: ranking_pb2.RankResponse, missing_values: int) -> None:
        """Observe the stages, knowledge levels and missing values of one ranking."""
        for stage, histogram in self._stages.items():
            histogram.observe(getattr(response.timings, f"{stage}_ms"))
        self._levels[USER][response.user_level].inc()
        self._count(ITEM, response.item_levels)
        self._missing.inc(missing_values)

    def served(self, entity: str, levels: NDArray[np.uint8], written_at_ms: NDArray[np.int64], at_ms: int) -> None:
        """Observe ages and expiries of n vectors that a model read; NEUTRAL ones are skipped, since none is stored.

        Args:
            entity: "user", "item" or "history".
            levels: Knowledge levels [n].
            written_at_ms: When each was written [n], milliseconds since 1970.
            at_ms: When they were read, milliseconds since 1970.
        """
        self._expired[entity].inc(int(np.count_nonzero(levels == STALE)))
        self._ages.observe(entity, (at_ms - written_at_ms[levels != NEUTRAL]) / HOUR_MS)

    def read(self, entity: EntityKind, levels: NDArray[np.uint8], written_at_ms: NDArray[np.int64], at_ms: int) -> None:
        """Observe vectors of n entities that a caller read: levels, and ages and expiries as in `served`."""
        self._count(entity, levels)
        self.served(entity, levels, written_at_ms, at_ms)

    def _count(self, entity: EntityKind, levels: Sequence[int] | NDArray[np.uint8]) -> None:
        for level, count in enumerate(np.bincount(levels)):
            if count:
                self._levels[entity][level].inc(int(count))

    def failed(self, backend: str) -> None:
        """Count one failure of a backend: "store" or a model."""
        self._failures.labels(backend).inc()


def _short(enum_name: str) -> str:
    """KNOWLEDGE_LEVEL_FULL -> full, RUNG_CALLER -> caller."""
    return enum_name.removeprefix("KNOWLEDGE_LEVEL_").removeprefix("RUNG_").lower()
