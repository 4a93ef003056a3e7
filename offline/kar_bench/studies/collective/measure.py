"""Owns the measurement of collective knowledge: models trained on the texts that fewer calls would bring.

Released texts stand in for the language model. For each share of calls, `kar_offline.generate.collective` plans which
entities are asked about and from which neighbours the vectors of the others are imputed. An entity with its own prompt
has its released text. The text about a cluster is the released text about its medoid. Models are then trained and
tested as in the quality study.

<work>/collective/<way>_<share>_seed<s>/    an encodings folder with the imputed vectors
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kar_bench.harness import machine, to_json
from kar_bench.splits import SplitProtocol, split_dataset
from kar_bench.studies.comparisons import Predicted, mean_difference, means
from kar_bench.studies.quality_runs import TrainingJob, TrainingTask, run_job
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST
from kar_offline.evaluate.metrics import Interval, bootstrap_weights
from kar_offline.generate.collective import HEAD, CallPlan, event_counts, plan_calls
from kar_offline.knowledge.imputation import NEIGHBOURS, mean_of_neighbours
from kar_offline.prompts import read_prompts
from kar_offline.stage_runner import run_stage
from kar_offline.train.processes import in_processes
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.content_hash import file_sha256
from kar_sidecar.entities import ITEM, EntityKind

__all__ = [
    "OWN",
    "WAYS",
    "CollectiveBenchmarkOptions",
    "CollectiveReport",
    "CollectiveVariant",
    "WayToShare",
    "measure_collective",
    "variants",
    "write_imputed_vectors",
]


class WayToShare(NamedTuple):
    """How calls are shared out, and how many neighbours an imputed vector has."""

    head: float
    """Share of the calls that goes to the most frequent items, each by itself; the others go to clusters."""
    neighbours: int


OWN: Final = "own"
"""In place of a way: each entity has its own text."""
WAYS: Final[Mapping[str, WayToShare]] = MappingProxyType(
    {
        "nearest": WayToShare(head=0.0, neighbours=1),
        "clusters": WayToShare(head=0.0, neighbours=NEIGHBOURS),
        "head": WayToShare(head=HEAD, neighbours=NEIGHBOURS),
    }
)
"""Vectors are imputed from the entity's own cluster, from the nearest clusters, or from these and frequent items."""
WITHOUT_KNOWLEDGE: Final = ("control", "raw_text")
"""Arms that read no knowledge."""
VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class CollectiveBenchmarkOptions:
    """Which arms are compared, with which shares of the calls."""

    arms: Sequence[str] = ("knowledge", "both_texts")
    """Arms that read knowledge: the first with each way to share calls, the others with the default way."""
    shares: Sequence[float] = (0.3, 0.1, 0.03)
    """Calls by entities; all calls are measured in any case."""
    model: str = "dcnv2"
    folds: int = 5
    seeds: Sequence[int] = (0,)
    """Seeds of training and of k-means."""


class CollectiveVariant(NamedTuple):
    """One line of the table: an arm, and where its knowledge comes from."""

    arm: str
    share: float
    """Calls by entities; 0 for arms that read no knowledge."""
    way: str
    """A name of `WAYS`, or `OWN`."""

    def encodings(self, base: str, seed: int) -> str:
        """The folder with its vectors, below the work folder; `base` holds the vectors of all own texts."""
        return base if self.way == OWN else f"collective/{self.way}_{self.share:g}_seed{seed}"


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """One training."""

    variant: CollectiveVariant
    fold: int
    seed: int
    predictions_sha256: str
    predicted: Predicted

    def to_json(self) -> dict[str, Any]:
        """All values side by side."""
        run = {"fold": self.fold, "seed": self.seed, "predictions_sha256": self.predictions_sha256}
        return {**self.variant._asdict(), **run, **means([self.predicted])._asdict()}


@dataclass(frozen=True, slots=True)
class CollectiveSummary:
    """One variant: calls, mean metrics, and differences in AUC to other variants by their names."""

    variant: CollectiveVariant
    item_calls: float
    """Calls about items, on average over seeds."""
    auc: float
    logloss: float
    gauc: float
    minus: Mapping[str, Interval]
    """To "control", "raw_text", and "all_calls": the same arm with all calls."""

    def to_json(self) -> dict[str, Any]:
        """All values side by side."""
        metrics = {"auc": self.auc, "logloss": self.logloss, "gauc": self.gauc}
        return {
            **self.variant._asdict(),
            "item_calls": self.item_calls,
            **metrics,
            "minus": to_json(self.minus),
        }


@dataclass(frozen=True, slots=True)
class CollectiveReport:
    """The study of collective knowledge."""

    dataset: str
    model: str
    folds: int
    seeds: Sequence[int]
    test_users: int
    entities: Mapping[str, int]
    """Number of entities by kind."""
    rows: Sequence[CollectiveRow]
    summary: Sequence[CollectiveSummary]
    machine: str


def variants(options: CollectiveBenchmarkOptions) -> list[CollectiveVariant]:
    """What is measured: arms without knowledge, then each arm with all calls and with fewer."""
    measured = [CollectiveVariant(arm, 0.0, OWN) for arm in WITHOUT_KNOWLEDGE]
    for number, arm in enumerate(options.arms):
        ways = list(WAYS)[-1:] if number else list(WAYS)
        measured.append(CollectiveVariant(arm, 1.0, OWN))
        measured += [CollectiveVariant(arm, share, way) for way in ways for share in options.shares]
    return measured


def write_imputed_vectors(work: WorkFolder, base: str, variant: CollectiveVariant, seed: int) -> Mapping[str, int]:
    """Write a variant's encodings folder as a stage; return the number of calls by kind of entity."""
    way = WAYS[variant.way]

    def build(draft: Path) -> dict[str, Any]:
        counts = event_counts(work.read(Dataset))
        calls: dict[str, int] = {}
        for kind in EntityKind:
            prompts = {prompt.id: prompt.raw_text for prompt in read_prompts(work.prompts) if prompt.entity == kind}
            header = json.loads((work.folder(base) / f"knowledge_{kind}.json").read_text())
            raw, own = (np.load(work.folder(base) / f"{source}_{kind}.npy") for source in ("raw", "knowledge"))
            ids, imputed = header["ids"], set(header.pop("lent", ()))
            own[np.isin(ids, list(imputed))] = 0
            digests = zip(ids, header["text_sha256"], strict=True)
            header["text_sha256"] = [None if id_ in imputed else digest for id_, digest in digests]
            texts = [prompts.get(id_, "") for id_ in ids]
            plan = plan_calls(
                ids,
                texts,
                raw,
                variant.share,
                counts=counts[kind],
                seed=seed,
                head=way.head,
                neighbours=way.neighbours,
            )
            np.save(draft / f"knowledge_{kind}.npy", _imputed(plan, ids, own))
            (draft / f"knowledge_{kind}.json").write_text(json.dumps(header))
            for suffix in ("npy", "json"):
                shutil.copyfile(work.folder(base) / f"raw_{kind}.{suffix}", draft / f"raw_{kind}.{suffix}")
            calls[kind] = plan.calls
        return calls

    # Names as in work folders of earlier versions.
    params = {"share": variant.share, "seed": seed, "head": way.head, "lenders": way.neighbours}
    inputs = {"dataset": work.dataset, "encoding": work.folder(base), "prompts": work.prompts}
    folder = work.folder(variant.encodings(base, seed))
    return run_stage(f"impute {folder.name}", folder, build, inputs=inputs, params=params, version=VERSION).report


def _imputed(plan: CallPlan, ids: Sequence[str], own: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [n, D] as the stage `encode` makes them; `own` [n, D] of a medoid stands for its cluster's."""
    row_of = {id_: row for row, id_ in enumerate(ids)} | {id_: int(rows[0]) for id_, rows in plan.clusters.items()}
    records = np.array([row_of[id_] for id_ in plan.record_ids])
    vectors = mean_of_neighbours(own[records[plan.neighbours]], plan.weights)
    vectors[plan.own] = own[plan.own]
    return vectors


def measure_collective(
    work: WorkFolder,
    base: str,
    options: CollectiveBenchmarkOptions,
    settings: TrainSettings,
    *,
    workers: int,
    resamples: int = 1000,
    on_epoch: Callable[[TrainingJob, int, int, int], None] = lambda job, epoch, finished, total: None,
) -> CollectiveReport:
    """Train what is missing and report on every variant.

    Args:
        work: Holds `dataset`, `prompts` and the vectors.
        base: Folder in `work` with the vectors of all own texts.
        options: What is compared.
        settings: Settings of training; the seed is the options'.
        workers: Processes side by side, one thread each; 0: train in this process.
        resamples: Resamples of the bootstrap over users.
        on_epoch: Called with a job, the number of its epoch (0: the job is finished), the number of finished
            trainings, and the number of all.
    """
    protocol = SplitProtocol("user", options.folds)
    measured = variants(options)
    calls = {
        (variant, seed): write_imputed_vectors(work, base, variant, seed)
        for variant in measured
        if variant.way != OWN
        for seed in options.seeds
    }
    jobs = [
        (variant, TrainingJob(options.model, variant.arm, fold, seed))
        for fold in range(options.folds)
        for seed in options.seeds
        for variant in measured
    ]
    tasks = [TrainingTask(work, protocol, variant.encodings(base, job.seed), job, settings) for variant, job in jobs]
    finished = 0

    def on_notice(notice: tuple[TrainingJob, int]) -> None:
        nonlocal finished
        job, epoch = notice
        finished += epoch == 0
        on_epoch(job, epoch, finished, len(tasks))

    in_processes(run_job, tasks, workers, on_notice)

    dataset = work.read(Dataset)
    predicted: dict[CollectiveVariant, list[Predicted]] = {variant: [] for variant in measured}
    rows, test_users = [], 0
    for fold in range(options.folds):
        split = split_dataset(dataset, protocol, fold)
        events = split.samples(TEST)
        labels, users = split.labels[events], split.event_user[events]
        weights = bootstrap_weights(len(np.unique(users)), seed=fold, resamples=resamples)
        test_users += weights.shape[1]
        for (variant, job), task in zip(jobs, tasks, strict=True):
            if job.fold == fold:
                file = job.folder(work, protocol, task.encodings) / "predictions.npy"
                metrics = Predicted.of(labels, np.load(file, allow_pickle=False), users, weights)
                predicted[variant].append(metrics)
                rows.append(CollectiveRow(variant, fold, job.seed, file_sha256(file), metrics))
    return CollectiveReport(
        dataset=dataset.name,
        model=options.model,
        folds=options.folds,
        seeds=options.seeds,
        test_users=test_users,
        entities={"item": len(dataset.items), "user": len(dataset.users)},
        rows=rows,
        summary=list(_summary(predicted, calls, len(dataset.items))),
        machine=machine(),
    )


def _summary(
    predicted: Mapping[CollectiveVariant, Sequence[Predicted]],
    calls: Mapping[tuple[CollectiveVariant, int], Mapping[str, int]],
    items: int,
) -> Iterator[CollectiveSummary]:
    control, raw_text = (CollectiveVariant(arm, 0.0, OWN) for arm in WITHOUT_KNOWLEDGE)
    for variant, ours in predicted.items():
        item_calls = [by_kind[ITEM] for (other, _), by_kind in calls.items() if other == variant]
        others = {"control": control, "raw_text": raw_text, "all_calls": CollectiveVariant(variant.arm, 1.0, OWN)}
        minus = {
            name: mean_difference(ours, predicted[other])
            for name, other in others.items()
            if variant not in (other, control) and other in predicted
        }
        mean_calls = float(np.mean(item_calls)) if item_calls else items * variant.share
        yield CollectiveSummary(variant, mean_calls, *means(ours), minus)
