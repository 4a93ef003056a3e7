"""Owns what the sidecar says about itself to Prometheus: every metric, its labels and its buckets."""

from typing import Final

import numpy as np
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kar.ranking.v1 import ranking_pb2
from kar.records.v1 import records_pb2

__all__ = ["Telemetry"]

STAGES: Final = ("assign", "fetch", "assemble", "score", "respond", "total")
BUCKETS_MS: Final = (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 250, 500, 1000)
LEVELS: Final = records_pb2.KnowledgeLevel.keys()


class Telemetry:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        """Create every metric, so that a scrape shows them all from the start."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "kar_requests",
            "Requests; rung and arm only for Rank.",
            ("rpc", "status", "rung", "arm"),
            registry=self.registry,
        )
        self._latency = Histogram(
            "kar_request_milliseconds",
            "Whole requests in the server.",
            ("rpc",),
            buckets=BUCKETS_MS,
            registry=self.registry,
        )
        stages = Histogram(
            "kar_stage_milliseconds", "Stages of Rank.", ("stage",), buckets=BUCKETS_MS, registry=self.registry
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}
        levels = Counter(
            "kar_knowledge_levels", "Entities of Rank by their knowledge.", ("entity", "level"), registry=self.registry
        )
        self._levels = {
            entity: [levels.labels(entity, _short(level)) for level in LEVELS] for entity in ("user", "item")
        }
        self._missing = Counter("kar_missing_values", "Numbers that were NaN or infinite.", registry=self.registry)
        self._failures = Counter(
            "kar_backend_failures",
            "Calls that a backend failed or did not answer.",
            ("backend",),
            registry=self.registry,
        )
        self.serving = Gauge("kar_serving", "1 while health says SERVING.", registry=self.registry)

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
        self._levels["user"][response.user_level].inc()
        for level, count in enumerate(np.bincount(response.item_levels)):
            if count:
                self._levels["item"][level].inc(int(count))
        self._missing.inc(missing_values)

    def failed(self, backend: str) -> None:
        """Count one failure of "store" or of a model."""
        self._failures.labels(backend).inc()


def _short(enum_name: str) -> str:
    """KNOWLEDGE_LEVEL_FULL -> full, RUNG_CALLER -> caller."""
    return enum_name.removeprefix("KNOWLEDGE_LEVEL_").removeprefix("RUNG_").lower()
