"""Owns the quality benchmark: what each arm gives each model, how sure that is, where it sits.

Every comparison is paired: the same test rows, the same resamples of users. Differences are means over folds and
seeds; each fold's users are resampled by themselves, so intervals cover the choice of users, each of whom is in the
test split of exactly one fold.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar_bench.studies.quality_runs import RUNGS, Job, Protocol, run_job, split_dataset, train_ranker
from kar_kernels.benchmark.machine import machine
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.rerank_lists import rerank_lists
from kar_offline.dataset.splits import TEST, TRAIN
from kar_offline.evaluate.caveats import caveats_of
from kar_offline.evaluate.metrics import (
    auc,
    bootstrap_weights,
    ece,
    gauc,
    holm,
    interval,
    logloss,
    reliability,
    resampled_auc,
)
from kar_offline.evaluate.ranking import average_precision, hit, ndcg
from kar_offline.knowledge.records import read_knowledge
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.stage_runner import stage_seconds
from kar_offline.train.arms import ARMS
from kar_offline.train.processes import in_processes
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.errors import PreconditionError

__all__ = ["BUCKETS", "COMPARISONS", "measure", "train_jobs"]

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
"""What an arm is compared with beside the control."""
BUCKETS: Final[Mapping[str, tuple[int, ...]]] = {
    "item_ratings": (0, 1, 6, 21, 101),
    "user_events": (0, 51, 101, 201),
    "events_before": (0, 11, 31, 101),
}
"""Lower bounds of training ratings of an item, of all events of a user, of those before a sample."""
CONFIDENCES: Final = ("high", "medium", "low")
UNSAID: Final = "not said"
CUTS: Final = (1, 3, 5, 7)
"""Ranks at which lists are cut."""
METRICS: Final = ("auc", "logloss", "gauc", "ece")
LIST_METRICS: Final = ("map", "ndcg")
BROKEN_DOWN: Final = ("control", "raw_text", "knowledge", "neutral", "cf", "cf_knowledge")


def train_jobs(
    work: WorkFolder,
    protocol: Protocol,
    encodings: str,
    jobs: Sequence[Job],
    settings: TrainSettings,
    *,
    workers: int,
    on_epoch: Callable[[Job, int], None],
) -> int:
    """Train what is missing of `jobs` and return how many that were; `on_epoch` hears of epochs, 0 when a job is done.

    Raises:
        PreconditionError: the dataset or the encodings are missing, or a fold has nobody to test.
        UnavailableError: a worker process was killed; the next call goes on.
    """
    dataset = work.read(Dataset)
    for fold in sorted({job.fold for job in jobs}):
        if not len(split_dataset(dataset, protocol, fold).samples(TEST)):
            raise PreconditionError(f"fold {fold} has no test samples: deal users into fewer folds, or bring more")
    tasks = [(work, protocol, encodings, job, settings) for job in jobs]
    # Jobs of one fold and seed share an initial ranker, which must be there before they run side by side.
    rankers = {(job.ranker, job.fold, job.seed): task for job, task in zip(jobs, tasks, strict=True) if job.ranker}
    in_processes(train_ranker, list(rankers.values()), workers, lambda notice: None)
    results = in_processes(run_job, tasks, workers, lambda notice: on_epoch(*notice))
    return sum(result.ran for result in results)


@dataclass(frozen=True, slots=True)
class _Fold:
    """The test rows of one fold, and what they are broken down by; all arrays are [S]."""

    labels: NDArray[np.float32]
    users: NDArray[np.int32]
    buckets: Mapping[str, NDArray[np.int64]]
    """Number of each row's bucket, by what names it."""
    weights: NDArray[np.float64]
    """[resamples, users] of the bootstrap."""

    @staticmethod
    def of(dataset: Dataset, confidence: Mapping[str, str], *, seed: int, resamples: int) -> "_Fold":
        events = dataset.samples(TEST)
        users, items = dataset.event_user[events], dataset.event_item[events]
        values = {
            "item_ratings": np.bincount(dataset.event_item[dataset.event_split == TRAIN], minlength=len(dataset.items))[
                items
            ],
            "user_events": np.diff(dataset.offsets)[users],
            "events_before": events - dataset.offsets[users],
        }
        buckets = {name: np.searchsorted(BUCKETS[name], value, side="right") - 1 for name, value in values.items()}
        if confidence:
            said = (*CONFIDENCES, UNSAID)
            of_item = [said.index(confidence.get(item.id, UNSAID)) for item in dataset.items]
            buckets["confidence"] = np.array(of_item, np.int64)[items]
        weights = bootstrap_weights(len(np.unique(users)), seed=seed, resamples=resamples)
        return _Fold(dataset.labels[events], users, buckets, weights)


@dataclass(frozen=True, slots=True)
class _Lists:
    """The test lists [n, C] of one fold and seed, their users [n], and the bootstrap's weights of users."""

    labels: NDArray[np.float32]
    users: NDArray[np.int64]
    weights: NDArray[np.float64]

    @staticmethod
    def of(dataset: Dataset, test: _Fold, seed: int) -> "_Lists":
        lists = rerank_lists(dataset, TEST, seed=seed)
        # A user with too few samples for a list has weights, but nothing to weigh.
        _, user = np.unique(np.concatenate([test.users, dataset.event_user[lists.event[:, 0]]]), return_inverse=True)
        return _Lists(lists.label, user[len(test.users) :], test.weights)

    def resampled(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means [resamples] of values [n] of lists; NaN ones are left out."""
        known = np.isfinite(values)
        users = self.weights.shape[1]
        total = np.bincount(self.users[known], values[known], users)
        return (self.weights @ total) / (self.weights @ np.bincount(self.users[known], minlength=users))


@dataclass(frozen=True, slots=True)
class _Scored:
    """One job's predictions [S] and what resampling makes of its AUC, or of its MAP, [resamples]."""

    job: Job
    scores: NDArray[np.float32]
    resampled: NDArray[np.float64]
    row: dict[str, Any]

    @property
    def value(self) -> float:
        """What is compared: AUC, or the MAP of a reranker."""
        return float(self.row["map" if "map" in self.row else "auc"])


def measure(
    work: WorkFolder,
    protocol: Protocol,
    encodings: str,
    jobs: Sequence[Job],
    *,
    seed: int = 0,
    resamples: int = 1000,
    on_job: Callable[[Job], None] = lambda job: None,
) -> dict[str, Any]:
    """The report over trained `jobs`: `rows`, `summary`, `breakdowns`, `calibration`,
    `training_seconds`, `caveats`, `machine`.

    `seed` and `resamples` are of the bootstrap. What the knowledge models score on the lower rungs is reported like
    further arms, named by `RUNGS`. Rerankers have MAP and NDCG of whole lists, and `at` the ranks `CUTS`,
    where others have AUC, LogLoss, GAUC and ECE. Differences (in AUC, for rerankers in MAP) carry `mean`, `low`,
    `high`, the two-sided `p` and `p_holm`, corrected for all comparisons of the report.
    """
    dataset = work.read(Dataset)
    folds: dict[int, _Fold] = {}
    scored: dict[tuple[str, str], list[_Scored]] = {}
    confidence = _confidence(work)
    for fold, in_fold in groupby(sorted(jobs, key=lambda job: job.fold), key=lambda job: job.fold):
        split = split_dataset(dataset, protocol, fold)
        test = folds[fold] = _Fold.of(split, confidence, seed=seed + fold, resamples=resamples)
        lists: dict[int, _Lists] = {}
        controls: dict[tuple[str, int], _Scored] = {}
        for job in sorted(in_fold, key=lambda job: (job.arm != "control", job.model, job.arm, job.seed)):
            if job.model in RERANKERS and job.seed not in lists:
                lists[job.seed] = _Lists.of(split, test, job.seed)
            on = lists[job.seed] if job.model in RERANKERS else test
            folder = job.folder(work, protocol, encodings)
            files = {job.arm: "predictions.npy"}
            if job.arm == "knowledge":
                files |= {rung: f"predictions_{rung}.npy" for rung in RUNGS}
            for arm, file in files.items():
                found = _score(replace(job, arm=arm), folder / file, on, dataset.name)
                if arm == job.arm:
                    found.row["seconds"] = stage_seconds(folder)
                if arm == "control":
                    controls[job.model, job.seed] = found
                elif control := controls.get((job.model, job.seed)):
                    difference = interval(found.value - control.value, found.resampled - control.resampled)
                    found.row["interval"] = asdict(difference)
                scored.setdefault((job.model, arm), []).append(found)
            on_job(job)
    return {
        "dataset": dataset.name,
        "split": protocol.name,
        "encodings": encodings,
        "test": {"users": sum(len(np.unique(f.users)) for f in folds.values()), "samples": _total(folds)},
        "rows": [one.row for group in scored.values() for one in group],
        "summary": _summary(scored),
        "breakdowns": _breakdowns(scored, folds),
        "calibration": _calibration(scored, folds),
        "training_seconds": sum(one.row.get("seconds", 0) for group in scored.values() for one in group),
        "caveats": [CHOSEN, *caveats_of(split_dataset(dataset, protocol, jobs[0].fold))],
        "machine": machine(),
    }


def _total(folds: Mapping[int, _Fold]) -> int:
    return sum(len(fold.labels) for fold in folds.values())


def _metrics(test: _Fold | _Lists, scores: NDArray) -> dict[str, Any]:
    if isinstance(test, _Lists):
        scores = scores.reshape(test.labels.shape)
        at = {
            str(k): {
                "map": float(np.nanmean(average_precision(test.labels, scores, k))),
                "ndcg": float(np.nanmean(ndcg(test.labels, scores, k))),
                "hits": float(np.nanmean(hit(test.labels, scores, k))),
            }
            for k in (*CUTS, test.labels.shape[1])
        }
        whole = at.pop(str(test.labels.shape[1]))
        return {"map": whole["map"], "ndcg": whole["ndcg"], "at": at}
    return {
        "auc": auc(test.labels, scores),
        "logloss": logloss(test.labels, scores),
        "gauc": gauc(test.labels, scores, test.users),
        "ece": ece(test.labels, scores),
    }


def _confidence(work: WorkFolder) -> dict[str, str]:
    """How sure the writer of an item's text was, by item id, where a text says so."""
    if not work.knowledge.is_dir():
        return {}
    records = read_knowledge(work.knowledge, "item")
    return {record.id: record.confidence for record in records if record.confidence in CONFIDENCES}


def _score(job: Job, file: Path, test: _Fold | _Lists, dataset: str) -> _Scored:
    scores = np.load(file, allow_pickle=False)
    row = {
        "dataset": dataset,
        "model": job.model,
        "arm": job.arm,
        "fold": job.fold,
        "seed": job.seed,
        **({"ranker": job.ranker} if job.ranker else {}),
        **_metrics(test, scores),
        "interval": None,
        "predictions_sha256": file_sha256(file),
    }
    if isinstance(test, _Lists):
        shaped = scores.reshape(test.labels.shape)
        resampled = test.resampled(average_precision(test.labels, shaped, test.labels.shape[1]))
    else:
        resampled = resampled_auc(test.labels, scores, test.users, test.weights)
    return _Scored(job, scores, resampled, row)


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = LIST_METRICS if "map" in rows[0] else METRICS
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def _pairs(scored: Mapping[tuple[str, str], Sequence[_Scored]]) -> Iterator[tuple[str, str, str]]:
    """Model, arm and the arm that it is compared with, of all comparisons that the jobs allow."""
    for model, arm in scored:
        for other in ("control", *COMPARISONS.get(arm, ())):
            if other != arm and (model, other) in scored:
                yield model, arm, other


def _summary(scored: Mapping[tuple[str, str], Sequence[_Scored]]) -> list[dict[str, Any]]:
    """One entry a model and arm: mean metrics, and its differences."""
    entries: dict[tuple[str, str], dict[str, Any]] = {
        key: {"model": key[0], "arm": key[1], "runs": len(group), **_mean([one.row for one in group]), "minus": {}}
        for key, group in scored.items()
    }
    compared = [(key, _difference(scored[key[0], key[1]], scored[key[0], key[2]])) for key in _pairs(scored)]
    corrected = holm([found["p"] for _, found in compared])
    for ((model, arm, other), found), p in zip(compared, corrected, strict=True):
        entries[model, arm]["minus"][other] = {**found, "p_holm": p}
    order = (*BACKBONES, *RERANKERS), (*ARMS, *RUNGS)
    return sorted(entries.values(), key=lambda entry: (order[0].index(entry["model"]), order[1].index(entry["arm"])))


def _difference(ours: Sequence[_Scored], theirs: Sequence[_Scored]) -> dict[str, float]:
    """Mean difference over the folds and seeds that both have, its interval and two-sided p-value.

    The p-value takes the bootstrap's standard error for that of a normal distribution.
    """
    other = {(one.job.fold, one.job.seed): one for one in theirs}
    pairs = [(one, other[key]) for one in ours if (key := (one.job.fold, one.job.seed)) in other]
    if not pairs:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "p": 1.0}
    resampled = np.mean([a.resampled - b.resampled for a, b in pairs], 0)
    mean = float(np.mean([a.value - b.value for a, b in pairs]))
    found = interval(mean, resampled)
    error = float(np.nanstd(resampled))
    # Counting resamples beyond 0 knows no p below 1 / resamples, which no correction for many comparisons survives.
    p = math.erfc(abs(mean) / (error * math.sqrt(2))) if error else float(mean == 0)
    return {"mean": mean, "low": found.low, "high": found.high, "p": p}


def _breakdowns(
    scored: Mapping[tuple[str, str], Sequence[_Scored]], folds: Mapping[int, _Fold]
) -> list[dict[str, Any]]:
    """AUC and GAUC in every bucket, over all folds together."""
    out = []
    for (model, arm), group in scored.items():
        if arm not in BROKEN_DOWN or model in RERANKERS:
            continue
        scores = np.concatenate([one.scores for one in group])
        labels = np.concatenate([folds[one.job.fold].labels for one in group])
        # AUC within a user must not mix the scores of two trainings.
        users = np.concatenate(
            [folds[one.job.fold].users.astype(np.int64) + (at << 32) for at, one in enumerate(group)]
        )
        for by in next(iter(folds.values())).buckets:
            numbers = np.concatenate([folds[one.job.fold].buckets[by] for one in group])
            for number, name in enumerate(_names(by)):
                here = numbers == number
                if here.any():
                    out.append(
                        {
                            "model": model,
                            "arm": arm,
                            "by": by,
                            "bucket": name,
                            "samples": int(here.sum()),
                            "auc": auc(labels[here], scores[here]),
                            "gauc": gauc(labels[here], scores[here], users[here]),
                        }
                    )
    return out


def _names(by: str) -> Sequence[str]:
    """What the buckets are called, in their order."""
    if by not in BUCKETS:
        return (*CONFIDENCES, UNSAID)
    bounds = BUCKETS[by]
    ends = [f"{low} to {high - 1}" if high - low > 1 else f"{low}" for low, high in pairwise(bounds)]
    return (*ends, f"{bounds[-1]} or more")


def _calibration(
    scored: Mapping[tuple[str, str], Sequence[_Scored]], folds: Mapping[int, _Fold]
) -> list[dict[str, Any]]:
    out = []
    for (model, arm), group in scored.items():
        if arm in BROKEN_DOWN and model not in RERANKERS:
            labels = np.concatenate([folds[one.job.fold].labels for one in group])
            found = reliability(labels, np.concatenate([one.scores for one in group]))
            out.append({"model": model, "arm": arm, "score": found.score.tolist(), "rate": found.rate.tolist()})
    return out
