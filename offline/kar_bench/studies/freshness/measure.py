"""Owns the measurement of freshness: the quality of each budget in the replayed month, and its cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar_bench.harness import machine, to_json
from kar_bench.studies.comparisons import MeanMetrics, Predicted, mean_difference, means
from kar_bench.studies.freshness.inputs import KnowledgeLevels
from kar_bench.studies.freshness.simulation import Month
from kar_bench.studies.freshness.spending import Prices, Spending
from kar_bench.studies.freshness.study import (
    CONTROL,
    NEVER_IMPUTED,
    FreshnessBenchmarkOptions,
    FreshnessStudy,
    FreshnessVariant,
    ReplayJob,
    ReplayTask,
    encode_user_texts,
    replay_jobs,
    run_replay,
    variants,
)
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.evaluate.metrics import Interval, bootstrap_weights
from kar_offline.train.processes import in_processes
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256

__all__ = ["FreshnessReport", "FreshnessRow", "FreshnessSummary", "MonthFacts", "measure_freshness"]

CAVEATS: Final = (
    "Released texts stand in for a language model's answers about items, template-made ones for those about users.",
    "Most users of MovieLens-100K rate all they ever rate on one day: a text of the next morning finds few of them.",
    "The writer of the released texts knew the films' later reputation and may have seen MovieLens.",
    "Traffic is what was rated, not what was asked for; a call brings a text unless gates refused the released one.",
)


@dataclass(frozen=True, slots=True)
class MonthFacts:
    """The replayed month and its events."""

    first_day: int
    """Counted from the day of the log's first event."""
    days: int
    train_events: int
    validation_events: int
    test_events: int
    users: int
    """Test users."""
    events_of_users_seen_before: float
    """Share of the month's events whose user had events before that morning."""
    events_of_items_seen_before: float


@dataclass(frozen=True, slots=True)
class FreshnessRow:
    """One training scored with one way of imputation."""

    variant: FreshnessVariant
    seed: int
    metrics: MeanMetrics
    predictions_sha256: str

    def to_json(self) -> dict[str, Any]:
        """All values side by side."""
        metrics = self.metrics._asdict()
        return {
            **self.variant.to_json(),
            "seed": self.seed,
            **metrics,
            "predictions_sha256": self.predictions_sha256,
        }


@dataclass(frozen=True, slots=True)
class FreshnessSummary:
    """One variant: mean metrics, differences in AUC by the other variant's name, calls and cost, and what was known."""

    variant: FreshnessVariant
    metrics: MeanMetrics
    minus: Mapping[str, Interval]
    """To "control", and to the same arm with "no_calls" and with "all_calls"."""
    spending: Spending
    levels: KnowledgeLevels

    def to_json(self) -> dict[str, Any]:
        """All values side by side, but for the differences and the levels."""
        return {
            **self.variant.to_json(),
            **self.metrics._asdict(),
            "minus": to_json(self.minus),
            **to_json(self.spending),
            "levels": to_json(self.levels),
        }


@dataclass(frozen=True, slots=True)
class FreshnessReport:
    """The study of freshness."""

    dataset: str
    model: str
    month: MonthFacts
    usd_per_million_tokens: Mapping[str, float]
    """Read, and written."""
    rows: Sequence[FreshnessRow]
    summary: Sequence[FreshnessSummary]
    caveats: Sequence[str]
    machine: str


def measure_freshness(
    work: WorkFolder,
    base: str,
    options: FreshnessBenchmarkOptions,
    settings: TrainSettings,
    make_encoder: Callable[[], TextEncoder],
    *,
    workers: int,
    resamples: int = 1000,
    on_epoch: Callable[[ReplayJob, int, int, int], None] = lambda job, epoch, finished, total: None,
) -> FreshnessReport:
    """Train what is missing, replay the month with every budget, and report.

    Args:
        work: Holds `dataset`, `prompts`, `knowledge` and the vectors.
        base: Folder in `work` with the vectors of released and raw texts.
        options: What is compared.
        settings: Settings of training; the seed is the options'.
        make_encoder: Makes the encoder of `base`; called if texts about users are not encoded yet.
        workers: Processes side by side, one thread each; 0: train in this process.
        resamples: Resamples of the bootstrap over users.
        on_epoch: Called with a job, the number of its epoch (0: the job is finished), the number of finished
            trainings, and the number of all.

    Raises:
        PreconditionError: a stage is missing, users have no common clock, or vectors come from two encoders.
        UnavailableError: a worker process was killed; the next call goes on.
    """
    study = FreshnessStudy(work, base, options)
    if any(study.reads_users(arm) for arm in options.arms):
        encode_user_texts(study, make_encoder)
    jobs = replay_jobs(options)
    finished = 0

    def on_notice(notice: tuple[ReplayJob, int]) -> None:
        nonlocal finished
        job, epoch = notice
        finished += epoch == 0
        on_epoch(job, epoch, finished, len(jobs))

    in_processes(run_replay, [ReplayTask(study, job, settings) for job in jobs], workers, on_notice)

    month, _ = study.month()
    events = month.dataset.samples(TEST)
    labels, users = month.dataset.labels[events], month.dataset.event_user[events]
    weights = bootstrap_weights(len(np.unique(users)), seed=0, resamples=resamples)
    predicted: dict[FreshnessVariant, list[Predicted]] = {}
    rows = []
    for job in jobs:
        for variant in job.variants():
            file = study.job_folder(job) / f"predictions_{variant.imputation}.npy"
            metrics = Predicted.of(labels, np.load(file, allow_pickle=False), users, weights)
            predicted.setdefault(variant, []).append(metrics)
            rows.append(FreshnessRow(variant, job.seed, means([metrics]), file_sha256(file)))
    prices = Prices.of(study)
    return FreshnessReport(
        dataset=month.dataset.name,
        model=options.model,
        month=_facts(month, events, weights.shape[1]),
        usd_per_million_tokens={"read": options.usd_per_million[0], "written": options.usd_per_million[1]},
        rows=rows,
        summary=[
            FreshnessSummary(
                variant,
                means(predicted[variant]),
                _differences(variant, predicted),
                prices.spending(month, study.history(variant.arm, variant.budget)),
                study.knowledge(variant.arm, variant.budget).levels(events, impute=variant.imputation != NEVER_IMPUTED),
            )
            for variant in variants(options)
        ],
        caveats=CAVEATS,
        machine=machine(),
    )


def _facts(month: Month, events: NDArray[np.int64], users: int) -> MonthFacts:
    item_seen = month.item_day[month.dataset.event_item[events]] < month.event_day[events]
    train, validation, test = (len(month.dataset.samples(split)) for split in (TRAIN, VALIDATION, TEST))
    return MonthFacts(
        month.first,
        month.days,
        train,
        validation,
        test,
        users,
        float((month.events_by_morning[events] > 0).mean()),
        float(item_seen.mean()),
    )


def _differences(
    variant: FreshnessVariant, predicted: Mapping[FreshnessVariant, Sequence[Predicted]]
) -> dict[str, Interval]:
    if variant.arm == CONTROL:
        return {}
    others = {
        "control": FreshnessVariant(CONTROL, 0),
        "no_calls": FreshnessVariant(variant.arm, 0),
        "all_calls": FreshnessVariant(variant.arm, None),
    }
    return {
        name: mean_difference(predicted[variant], predicted[other])
        for name, other in others.items()
        if other != variant
    }
