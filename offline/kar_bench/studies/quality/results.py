"""Owns the report of the quality study: rows of trainings, a summary with differences, breakdowns, calibration."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kar_bench.harness import OMIT_IF_NONE, to_json
from kar_offline.evaluate.metrics import Interval

__all__ = [
    "ArmSummary",
    "BucketMetrics",
    "CalibrationCurve",
    "ClickMetrics",
    "CutMetrics",
    "ListMetrics",
    "PairedDifference",
    "QualityReport",
    "QualityRow",
    "SampleSize",
]


class ClickMetrics(NamedTuple):
    """Metrics of a click model on test samples."""

    auc: float
    logloss: float
    gauc: float
    ece: float


class ListMetrics(NamedTuple):
    """Metrics of a reranker on whole test lists."""

    map: float
    ndcg: float


class CutMetrics(NamedTuple):
    """Metrics of a reranker on lists cut at one rank."""

    map: float
    ndcg: float
    hits: float


class PairedDifference(NamedTuple):
    """A difference in AUC (rerankers: MAP) with its 95 % interval and two-sided p-values."""

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    """Corrected for all comparisons of the report, after Holm."""


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One training, or the knowledge model of one training on a lower rung."""

    dataset: str
    model: str
    arm: str
    """An arm, or a rung of the knowledge model."""
    fold: int
    seed: int
    ranker: str | None
    metrics: ClickMetrics | ListMetrics
    at: Mapping[str, CutMetrics] | None
    """Rerankers: metrics by the rank at which lists are cut."""
    interval: Interval | None
    """Difference to the control of the same fold and seed."""
    predictions_sha256: str
    seconds: float | None = None
    """Seconds of the training; None on lower rungs, which are not trained."""

    def to_json(self) -> dict[str, Any]:
        """Metrics are keys beside the others; keys without a value are left out, but for the interval."""
        optional = {"ranker": self.ranker, "at": self.at, "seconds": self.seconds}
        pairs = {
            "dataset": self.dataset,
            "model": self.model,
            "arm": self.arm,
            "fold": self.fold,
            "seed": self.seed,
            "ranker": self.ranker,
            **self.metrics._asdict(),
            "at": self.at,
            "interval": self.interval,
            "predictions_sha256": self.predictions_sha256,
            "seconds": self.seconds,
        }
        return {key: value for key, value in pairs.items() if value is not None or key not in optional}


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One model with one arm: mean metrics over folds and seeds, and differences to other arms by their names."""

    model: str
    arm: str
    runs: int
    metrics: ClickMetrics | ListMetrics
    minus: Mapping[str, PairedDifference]

    def to_json(self) -> dict[str, Any]:
        """Metrics are keys beside the others."""
        name = {"model": self.model, "arm": self.arm, "runs": self.runs}
        return {**name, **self.metrics._asdict(), "minus": to_json(self.minus)}


@dataclass(frozen=True, slots=True)
class BucketMetrics:
    """Metrics of one model and arm on the test samples of one bucket, over all folds together."""

    model: str
    arm: str
    by: str
    """What samples are divided by, such as "item_ratings"."""
    bucket: str
    samples: int
    auc: float
    gauc: float


@dataclass(frozen=True, slots=True)
class CalibrationCurve:
    """Mean score and share of positives in bins of equally many samples."""

    model: str
    arm: str
    score: Sequence[float]
    rate: Sequence[float]


class SampleSize(NamedTuple):
    """Users and samples of all tested folds together."""

    users: int
    samples: int


@dataclass(frozen=True, slots=True)
class QualityReport:
    """The quality study; the last three fields are of the run that made it."""

    dataset: str
    split: str
    encodings: str
    test: SampleSize
    rows: Sequence[QualityRow]
    summary: Sequence[ArmSummary]
    breakdowns: Sequence[BucketMetrics]
    calibration: Sequence[CalibrationCurve]
    training_seconds: float
    caveats: Sequence[str]
    machine: str
    settings: Mapping[str, Any] | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)
    """Settings of training."""
    trained: int | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)
    """Trainings that this run had to make."""
    seconds: float | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)
