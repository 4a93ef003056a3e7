"""Owns the report of an evaluation: the metrics of every model on the test samples."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from kar_offline.evaluate.metrics import Interval

__all__ = ["NEUTRAL", "EvaluationReport", "SampleSize"]

NEUTRAL: Final = "neutral"
"""The knowledge model without knowledge: every user and item has the neutral vector."""
MetricByArm = Mapping[str, Mapping[str, float]]
"""By backbone and arm, such as `values["din"]["control"]`; `NEUTRAL` is one more arm."""


@dataclass(frozen=True, slots=True)
class SampleSize:
    """The size of the test split."""

    users: int
    samples: int


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Metrics of every backbone and arm on the test samples."""

    auc: MetricByArm
    logloss: MetricByArm
    """Nats."""
    gauc: MetricByArm
    calibration: MetricByArm
    """Mean prediction divided by mean label."""
    intervals: Mapping[str, Mapping[str, Interval]]
    """Differences of AUC by backbone and pair of arms, such as "knowledge_minus_control"."""
    test: SampleSize
    caveats: tuple[str, ...]
    """Sentences to keep in mind with the figures."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)
