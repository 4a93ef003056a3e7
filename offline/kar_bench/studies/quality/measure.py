"""Owns the measurement of the quality study: trainings, their metrics, and differences between arms.

Comparisons are paired, see `comparisons`. Differences are means over folds and seeds. The users of each fold are
resampled by themselves, so intervals cover the choice of users, each of whom is tested in exactly one fold.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kar_bench.harness import machine
from kar_bench.splits import SplitProtocol, split_dataset
from kar_bench.studies.quality.folds import FoldLists, FoldSamples, bucket_names, read_confidence
from kar_bench.studies.quality.results import (
    ArmSummary,
    BucketMetrics,
    CalibrationCurve,
    ClickMetrics,
    CutMetrics,
    ListMetrics,
    PairedDifference,
    QualityReport,
    QualityRow,
    SampleSize,
)
from kar_bench.studies.quality_runs import RUNGS, TrainingJob, TrainingTask, run_job, train_ranker
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.caveats import caveats_of
from kar_offline.evaluate.metrics import auc, ece, gauc, holm, interval, logloss, reliability, resampled_auc
from kar_offline.evaluate.ranking import average_precision, hit, ndcg
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.stage_runner import stage_seconds
from kar_offline.train.arms import ARMS
from kar_offline.train.processes import in_processes
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import PreconditionError

__all__ = ["COMPARISONS", "measure_quality", "train_jobs"]

CHOSEN: Final = (
    "Hyperparameters and the affinity's form were chosen on validation users of one fold of MovieLens-100K, for DCNv2."
)
COMPARISONS: Final = {
    "knowledge": ("raw_text", "statistics", "shuffled", "random", "affinity", "paper"),
    "raw_text": ("statistics",),
    "paper": ("items_only", "users_only", "one_moe", "one_mlp", "no_adaptor"),
    "cf_knowledge": ("cf", "knowledge"),
    "both_texts": ("raw_text", "knowledge"),
    "cf_both_texts": ("cf", "cf_knowledge"),
}
"""Arms with which an arm is compared beside the control."""
CUTS: Final = (1, 3, 5, 7)
"""Ranks at which lists are cut."""
BROKEN_DOWN: Final = ("control", "raw_text", "knowledge", "neutral", "cf", "cf_knowledge")
"""Arms with breakdowns and calibration."""


def train_jobs(
    work: WorkFolder,
    protocol: SplitProtocol,
    encodings: str,
    jobs: Sequence[TrainingJob],
    settings: TrainSettings,
    *,
    workers: int,
    on_epoch: Callable[[TrainingJob, int], None],
) -> int:
    """Train those of `jobs` that are not trained yet and return their number.

    `on_epoch` gets a job with the number of each epoch, and 0 when the job is finished.

    Raises:
        PreconditionError: the dataset or the encodings are missing, or a fold has nobody to test.
        UnavailableError: a worker process was killed; the next call goes on.
    """
    dataset = work.read(Dataset)
    for fold in sorted({job.fold for job in jobs}):
        if not len(split_dataset(dataset, protocol, fold).samples(TEST)):
            raise PreconditionError(f"fold {fold} has no test samples: deal users into fewer folds, or bring more")
    tasks = [TrainingTask(work, protocol, encodings, job, settings) for job in jobs]
    # Jobs of one fold and seed share an initial ranker, which must be trained before they run side by side.
    rankers = {(task.job.ranker, task.job.fold, task.job.seed): task for task in tasks if task.job.ranker}
    in_processes(train_ranker, list(rankers.values()), workers, lambda notice: None)
    results = in_processes(run_job, tasks, workers, lambda notice: on_epoch(*notice))
    return sum(result.ran for result in results)


@dataclass(frozen=True, slots=True)
class _Scored:
    """One job's predictions."""

    job: TrainingJob
    scores: NDArray[np.float32]
    """[S]"""
    resampled: NDArray[np.float64]
    """[R] AUC, or MAP of a reranker, under the bootstrap's weights."""
    row: QualityRow

    @property
    def value(self) -> float:
        """What is compared: AUC, or the MAP of a reranker."""
        metrics = self.row.metrics
        return metrics.map if isinstance(metrics, ListMetrics) else metrics.auc


_ByArm = Mapping[tuple[str, str], Sequence[_Scored]]
"""Predictions by model and arm."""


def measure_quality(
    work: WorkFolder,
    protocol: SplitProtocol,
    encodings: str,
    jobs: Sequence[TrainingJob],
    *,
    seed: int = 0,
    resamples: int = 1000,
    on_job: Callable[[TrainingJob], None] = lambda job: None,
) -> QualityReport:
    """The report over trained `jobs`; `seed` and `resamples` are the bootstrap's.

    The scores of the knowledge models on lower rungs are reported like further arms, with the names of `RUNGS`.
    """
    dataset = work.read(Dataset)
    folds: dict[int, FoldSamples] = {}
    scored: dict[tuple[str, str], list[_Scored]] = {}
    confidence = read_confidence(work)
    for fold, in_fold in groupby(sorted(jobs, key=lambda job: job.fold), key=lambda job: job.fold):
        split = split_dataset(dataset, protocol, fold)
        tested = folds[fold] = FoldSamples.of(split, confidence, seed=seed + fold, resamples=resamples)
        lists: dict[int, FoldLists] = {}
        controls: dict[tuple[str, int], _Scored] = {}
        for job in sorted(in_fold, key=lambda job: (job.arm != "control", job.model, job.arm, job.seed)):
            if job.model in RERANKERS and job.seed not in lists:
                lists[job.seed] = FoldLists.of(split, tested, job.seed)
            test = lists[job.seed] if job.model in RERANKERS else tested
            for arm, result in _score_job(job, job.folder(work, protocol, encodings), test, dataset.name):
                if arm == "control":
                    controls[job.model, job.seed] = result
                elif control := controls.get((job.model, job.seed)):
                    interval_to_control = interval(result.value - control.value, result.resampled - control.resampled)
                    result = replace(result, row=replace(result.row, interval=interval_to_control))
                scored.setdefault((job.model, arm), []).append(result)
            on_job(job)
    rows = [result.row for results in scored.values() for result in results]
    return QualityReport(
        dataset=dataset.name,
        split=protocol.name,
        encodings=encodings,
        test=SampleSize(
            sum(len(np.unique(fold.users)) for fold in folds.values()), sum(len(fold.labels) for fold in folds.values())
        ),
        rows=rows,
        summary=_summary(scored),
        breakdowns=list(_breakdowns(scored, folds)),
        calibration=list(_calibration(scored, folds)),
        training_seconds=sum(row.seconds or 0 for row in rows),
        caveats=[CHOSEN, *caveats_of(split_dataset(dataset, protocol, jobs[0].fold))],
        machine=machine(),
    )


def _score_job(
    job: TrainingJob, folder: Path, test: FoldSamples | FoldLists, dataset: str
) -> Iterator[tuple[str, _Scored]]:
    """A job's predictions by arm: its own, and for the knowledge model those of lower rungs."""
    yield job.arm, _score(job, job.arm, folder / "predictions.npy", test, dataset, stage_seconds(folder))
    if job.arm == "knowledge":
        for rung in RUNGS:
            yield rung, _score(job, rung, folder / f"predictions_{rung}.npy", test, dataset, None)


def _score(
    job: TrainingJob, arm: str, file: Path, test: FoldSamples | FoldLists, dataset: str, seconds: float | None
) -> _Scored:
    scores = np.load(file, allow_pickle=False)
    by_cut = None
    metrics: ClickMetrics | ListMetrics
    if isinstance(test, FoldLists):
        length = test.labels.shape[1]
        shaped = scores.reshape(test.labels.shape)
        metrics = ListMetrics(*_cut(test, shaped, length)[:2])
        by_cut = {str(cut): _cut(test, shaped, cut) for cut in CUTS}
        resampled = test.resampled_mean(average_precision(test.labels, shaped, length))
    else:
        metrics = ClickMetrics(
            auc(test.labels, scores),
            logloss(test.labels, scores),
            gauc(test.labels, scores, test.users),
            ece(test.labels, scores),
        )
        resampled = resampled_auc(test.labels, scores, test.users, test.weights)
    row = QualityRow(
        dataset=dataset,
        model=job.model,
        arm=arm,
        fold=job.fold,
        seed=job.seed,
        ranker=job.ranker or None,
        metrics=metrics,
        at=by_cut,
        interval=None,
        predictions_sha256=file_sha256(file),
        seconds=seconds,
    )
    return _Scored(job, scores, resampled, row)


def _cut(test: FoldLists, scores: NDArray, rank: int) -> CutMetrics:
    return CutMetrics(
        float(np.nanmean(average_precision(test.labels, scores, rank))),
        float(np.nanmean(ndcg(test.labels, scores, rank))),
        float(np.nanmean(hit(test.labels, scores, rank))),
    )


def _summary(scored: _ByArm) -> list[ArmSummary]:
    """One entry for each model and arm."""
    compared = [
        (model, arm, other)
        for model, arm in scored
        for other in ("control", *COMPARISONS.get(arm, ()))
        if other != arm and (model, other) in scored
    ]
    tested = [_test(scored[model, arm], scored[model, other]) for model, arm, other in compared]
    corrected = holm([result.p for result in tested])
    minus: dict[tuple[str, str], dict[str, PairedDifference]] = {key: {} for key in scored}
    for (model, arm, other), result, p_holm in zip(compared, tested, corrected, strict=True):
        minus[model, arm][other] = result._replace(p_holm=p_holm)
    entries = [
        ArmSummary(model, arm, len(results), _mean([result.row for result in results]), minus[model, arm])
        for (model, arm), results in scored.items()
    ]
    models, arms = (*BACKBONES, *RERANKERS), (*ARMS, *RUNGS)
    return sorted(entries, key=lambda entry: (models.index(entry.model), arms.index(entry.arm)))


def _mean(rows: Sequence[QualityRow]) -> ClickMetrics | ListMetrics:
    kind = type(rows[0].metrics)
    return kind(*(float(np.mean(values)) for values in zip(*(row.metrics for row in rows), strict=True)))


def _test(ours: Sequence[_Scored], theirs: Sequence[_Scored]) -> PairedDifference:
    """Mean difference over the folds and seeds of both, its interval and its two-sided p-value, not yet corrected.

    The p-value takes the standard deviation of the resampled differences as the standard error of a normal
    distribution.
    """
    by_run = {(result.job.fold, result.job.seed): result for result in theirs}
    pairs = [(our, by_run[key]) for our in ours if (key := (our.job.fold, our.job.seed)) in by_run]
    if not pairs:
        return PairedDifference(math.nan, math.nan, math.nan, 1.0, 1.0)
    resampled = np.mean([our.resampled - their.resampled for our, their in pairs], 0)
    mean_difference = interval(float(np.mean([our.value - their.value for our, their in pairs])), resampled)
    error = float(np.nanstd(resampled))
    # The share of resamples beyond 0 cannot fall below 1 / resamples, which no correction for many tests survives.
    p = math.erfc(abs(mean_difference.mean) / (error * math.sqrt(2))) if error else float(mean_difference.mean == 0)
    return PairedDifference(mean_difference.mean, mean_difference.low, mean_difference.high, p, p)


def _detailed(scored: _ByArm) -> Iterator[tuple[str, str, Sequence[_Scored]]]:
    """Click models and arms that have breakdowns and calibration."""
    for (model, arm), results in scored.items():
        if arm in BROKEN_DOWN and model not in RERANKERS:
            yield model, arm, results


def _breakdowns(scored: _ByArm, folds: Mapping[int, FoldSamples]) -> Iterator[BucketMetrics]:
    """AUC and GAUC in every bucket, over all folds together."""
    for model, arm, results in _detailed(scored):
        tested = [folds[result.job.fold] for result in results]
        scores = np.concatenate([result.scores for result in results])
        labels = np.concatenate([fold.labels for fold in tested])
        # AUC within a user must not mix the scores of two trainings.
        users = np.concatenate([fold.users.astype(np.int64) + (run << 32) for run, fold in enumerate(tested)])
        for by in tested[0].buckets:
            numbers = np.concatenate([fold.buckets[by] for fold in tested])
            for number, name in enumerate(bucket_names(by)):
                here = numbers == number
                if here.any():
                    metrics = auc(labels[here], scores[here]), gauc(labels[here], scores[here], users[here])
                    yield BucketMetrics(model, arm, by, name, int(here.sum()), *metrics)


def _calibration(scored: _ByArm, folds: Mapping[int, FoldSamples]) -> Iterator[CalibrationCurve]:
    for model, arm, results in _detailed(scored):
        labels = np.concatenate([folds[result.job.fold].labels for result in results])
        curve = reliability(labels, np.concatenate([result.scores for result in results]))
        yield CalibrationCurve(model, arm, curve.score.tolist(), curve.rate.tolist())
