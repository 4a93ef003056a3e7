"""Owns the trainings behind the quality benchmark: one model, arm, fold and seed a stage, its predictions on disk.

<work>/quality/<encodings>/<split>/fold<f>_seed<s>/<model>_<arm>/
  predictions.npy           [S] float32 probabilities of the fold's test rows, in their order
  predictions_<rung>.npy    the same when less is known, for the arm "knowledge"
Behind an initial ranker the folder is <model>_<arm>_after_<ranker>; lists are saved in their own order all the same.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kar_kernels import Tower
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TEST, TRAIN
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.stage_runner import StageResult, folder_hash, run_stage
from kar_offline.train.arms import ARMS, DEFAULT_ARMS
from kar_offline.train.batches import Batches
from kar_offline.train.features import EncodedDataset, encode_dataset
from kar_offline.train.fit import STATE
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.run import InitialRanker, Run, new_model, rows_of_split, train_run
from kar_offline.train.samples import samples_of_split
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError

__all__ = [
    "RUNGS",
    "Job",
    "Protocol",
    "default_jobs",
    "fold_data",
    "possible_arms",
    "run_job",
    "split_dataset",
    "train_ranker",
]

VERSION: Final = 1
RANKER: Final = "ranker.safetensors"
RUNGS: Final[Mapping[str, tuple[Tower, ...]]] = {"neutral": ("user", "item")}
"""What is forgotten on the lower rungs of the knowledge model."""
WIDE: Final = ("dcnv2", "din")
"""Models that are measured with every arm but `ON_DEMAND`; the others with `DEFAULT_ARMS`."""
ON_DEMAND: Final = ("both_texts", "cf_both_texts")
"""Arms that are measured only when named: they came after the committed table."""
COSTS: Final = {"xdeepfm": 9, "dien": 8, "autoint": 4, "fibinet": 3, "din": 2.5, "fignn": 2}
"""Seconds of a training, roughly and in relation to the others' 1: long ones start first."""

Split = Literal["user", "time"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a dataset is split: by user into folds, each of which tests once, or by time, with one fold."""

    split: Split = "user"
    folds: int = 5
    share: float = 1.0
    """Of the training users, by user split."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        by = f"user{self.folds}" if self.split == "user" else "time"
        return by if self.share == 1 else f"{by}_share{self.share:g}"


@dataclass(frozen=True, slots=True)
class Job:
    """One training."""

    model: str
    arm: str
    fold: int
    seed: int
    ranker: str = ""
    """Of a reranker: the model, trained without knowledge, in whose order lists are; empty: their own order."""

    @property
    def cost(self) -> float:
        """How long it takes, in relation to others."""
        arm = ARMS[self.arm]
        return COSTS.get(self.model, 1) * (1 + 0.5 * bool(arm.towers) + 2 * arm.learned_affinity)

    def folder(self, work: WorkFolder, protocol: Protocol, encodings: str) -> Path:
        """Where its stage writes."""
        run = f"{self.model}_{self.arm}" + (f"_after_{self.ranker}" if self.ranker else "")
        return work.root / "quality" / encodings / protocol.name / f"fold{self.fold}_seed{self.seed}" / run


def possible_arms(encodings: Path) -> list[str]:
    """Arms whose texts are in the folder of an encoding stage; texts about users may be missing."""
    header = encodings / "knowledge_user.json"
    users = header.is_file() and any(json.loads(header.read_text())["text_sha256"])
    return [name for name, arm in ARMS.items() if users or "user" not in arm.towers]


def default_jobs(
    models: Sequence[str],
    arms: Sequence[str],
    folds: Sequence[int],
    seeds: Sequence[int],
    ranker: str = "",
    possible: Sequence[str] = tuple(ARMS),
) -> list[Job]:
    """The grid, fold by fold, long trainings first; without `models` or `arms` what each model is measured with.

    With an initial `ranker` the models are rerankers. `possible` are the arms whose texts are there.

    Raises:
        InputError: one of `arms` is not possible.
    """
    if impossible := [arm for arm in arms if arm not in possible]:
        raise InputError(f"arm {impossible[0]!r} reads texts about users, and none are encoded here: leave it out")
    chosen = models or (RERANKERS if ranker else (*BACKBONES, *RERANKERS))
    wide = [arm for arm in possible if arm not in ON_DEMAND]

    def arms_of(model: str) -> Sequence[str]:
        return arms or (wide if model in WIDE else DEFAULT_ARMS)

    jobs = [
        Job(model, arm, fold, seed, ranker)
        for model in chosen
        for arm in arms_of(model)
        for fold in folds
        for seed in seeds
    ]
    return sorted(jobs, key=lambda job: (job.seed, job.fold, -job.cost, job.model))


def split_dataset(dataset: Dataset, protocol: Protocol, fold: int) -> Dataset:
    """The dataset as one fold sees it."""
    if protocol.split == "time":
        return dataset.split_by_time()
    dataset = dataset.split_by_user(fold=fold, folds=protocol.folds)
    return dataset if protocol.share == 1 else dataset.with_less_training(protocol.share)


@lru_cache(maxsize=1)
def fold_data(folder: Path, content: str, protocol: Protocol, fold: int) -> EncodedDataset:
    """One fold's arrays, kept for this process' next job; `content` is the dataset folder's hash."""
    return encode_dataset(split_dataset(Dataset.load(folder), protocol, fold))


Task = tuple[WorkFolder, Protocol, str, Job, TrainSettings]
"""Work folder, protocol, name of the encodings' folder, the job, and settings whose seed is the job's."""


def _data(work: WorkFolder, protocol: Protocol, fold: int) -> EncodedDataset:
    return fold_data(work.dataset, folder_hash(work.dataset), protocol, fold)


def _ranker_folder(work: WorkFolder, protocol: Protocol, job: Job) -> Path:
    return Job(job.ranker, "initial", job.fold, job.seed).folder(work, protocol, "")


def train_ranker(task: Task, notify: Callable[[Any], None]) -> StageResult:
    """Train the initial ranker of a job's fold and seed as a stage."""
    work, protocol, _, job, settings = task
    settings = replace(settings, seed=job.seed)

    def build(draft: Path) -> dict[str, Any]:
        run = Run(job.ranker, "control")
        trained = train_run(_data(work, protocol, job.fold), work.root, run, settings, folder=draft)
        save_file({name: value.contiguous() for name, value in trained.model.state_dict().items()}, draft / RANKER)
        (draft / STATE).unlink()
        return {"best_epoch": trained.fitted.best.number}

    folder, inputs = _ranker_folder(work, protocol, job), {"dataset": work.dataset}
    params = {"protocol": protocol.name, "model": job.ranker, "fold": job.fold, **settings.to_json()}
    return run_stage(f"initial {job.ranker}", folder, build, inputs=inputs, params=params, version=VERSION)


def _ranker(
    work: WorkFolder, protocol: Protocol, job: Job, data: EncodedDataset, settings: TrainSettings
) -> InitialRanker:
    run = Run(job.ranker, "control")
    given = KnowledgeInputs.for_training(
        ARMS[run.arm], data, samples_of_split(data, TRAIN), work.root, seed=settings.seed
    )
    model = new_model(run, data, given, settings)
    model.load_state_dict(load_file(_ranker_folder(work, protocol, job) / RANKER))
    return InitialRanker(model.eval(), given)


def run_job(task: Task, notify: Callable[[tuple[Job, int]], None]) -> StageResult:
    """Train and predict one job as a stage; `notify` hears of each epoch, and 0 at the end.

    The initial ranker of a job that has one is there already.
    """
    work, protocol, encodings, job, settings = task
    settings = replace(settings, seed=job.seed)
    arm = ARMS[job.arm]

    def build(draft: Path) -> dict[str, Any]:
        data = _data(work, protocol, job.fold)
        run = Run(job.model, job.arm)
        ranker = _ranker(work, protocol, job, data, settings) if job.ranker else None
        trained = train_run(
            data,
            work.root / encodings,
            run,
            settings,
            folder=draft,
            ranker=ranker,
            on_epoch=lambda epoch: notify((job, epoch.number)),
        )
        samples = rows_of_split(data, job.model, TEST, settings.seed)
        order = ranker.order(data, samples) if ranker else torch.arange(len(samples))
        served = trained.knowledge_inputs.as_served()
        given = {"": served} | (
            {f"_{rung}": served.without_knowledge_of(kinds) for rung, kinds in RUNGS.items()}
            if job.arm == "knowledge"
            else {}
        )
        for rung, known in given.items():
            scores = torch.empty(len(samples))
            scores[order] = torch.sigmoid(predict_logits(trained.model, Batches(data, samples.rows(order), known)))
            np.save(draft / f"predictions{rung}.npy", scores.numpy())
        (draft / STATE).unlink()
        fitted = trained.fitted
        return {"validation_loss": fitted.best.validation_loss, "best_epoch": fitted.best.number, **trained.sizes}

    inputs = {"dataset": work.dataset} | ({"encoding": work.root / encodings} if arm.texts else {})
    params = {"protocol": protocol.name, "model": job.model, "arm": job.arm, "fold": job.fold, **settings.to_json()}
    params |= {"ranker": job.ranker} if job.ranker else {}
    folder = job.folder(work, protocol, encodings)
    result = run_stage(f"{job.model} {job.arm}", folder, build, inputs=inputs, params=params, version=VERSION)
    notify((job, 0))
    return result
