"""Owns the trace of one ranking request: its deadline, the time of each stage, and the reasons for a lower rung."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np

from kar.ranking.v1 import ranking_pb2
from kar_sidecar.errors import KarError
from kar_sidecar.telemetry import Telemetry

__all__ = ["RequestTrace"]

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class RequestTrace:
    """What happened to one request so far. Times are seconds of `clock`. Construct with `RequestTrace.start`."""

    telemetry: Telemetry
    clock: Callable[[], float]
    started_s: float
    deadline_s: float
    stage_started_s: float
    stages_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of each finished stage, by its field name in `StageTimings`."""
    reasons: list[str] = field(default_factory=list)
    """Reasons, in words, why the answer uses less knowledge than it could."""

    @classmethod
    def start(cls, telemetry: Telemetry, clock: Callable[[], float], *, left_s: float | None, margin_ms: float) -> Self:
        """Start the trace of a request that must be answered within `left_s` seconds (None: no deadline).

        The last `margin_ms` milliseconds are reserved for sending the response.
        """
        now = clock()
        deadline_s = np.inf if left_s is None else now + left_s - margin_ms / 1e3
        return cls(telemetry, clock, now, deadline_s, now)

    def left_s(self, limit_ms: float = np.inf) -> float:
        """Seconds until the deadline, at most `limit_ms`."""
        return min(limit_ms / 1e3, self.deadline_s - self.clock())

    def record_stage(self, stage: str) -> None:
        """Record the time since the end of the previous stage as the time of `stage`."""
        now = self.clock()
        self.stages_ms[f"{stage}_ms"] = (now - self.stage_started_s) * 1e3
        self.stage_started_s = now

    def record_failure(self, backend: str, reason: str) -> None:
        """Count a failure of a backend, and note its reason for the response."""
        self.telemetry.failed(backend)
        self.reasons.append(f"{backend}: {reason}")

    async def attempt(self, backend: str, call: Awaitable[T], timeout_s: float) -> T | None:
        """The result of a backend's call; None, with a recorded failure, when it fails or takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except TimeoutError:
            reason = f"no answer within {timeout_s * 1e3:.1f} ms"
        except KarError as error:
            reason = str(error)
        except Exception:  # a bug in one backend must not cost the caller its answer
            log.exception("backend_fault backend=%s", backend)
            reason = "an unexpected fault, see the server's log"
        self.record_failure(backend, reason)
        return None

    def timings(self) -> ranking_pb2.StageTimings:
        """Milliseconds of all stages; the time since the last recorded one is the stage `respond`."""
        total_ms = (self.clock() - self.started_s) * 1e3
        respond_ms = total_ms - sum(self.stages_ms.values())
        return ranking_pb2.StageTimings(**self.stages_ms, respond_ms=respond_ms, total_ms=total_ms)
