"""Owns the trainings behind the quality studies: a stage for each model, arm, fold and seed, with its predictions.

<work>/quality/<encodings>/<split>/fold<f>_seed<s>/<model>_<arm>/
  predictions.npy           [S] float32 probabilities of the fold's test rows, in their order
  predictions_<rung>.npy    the same with less knowledge, for the arm "knowledge"

Behind an initial ranker the folder is <model>_<arm>_after_<ranker>. Its lists are saved in their own order too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kar_bench.splits import SplitProtocol, split_dataset
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
    "TrainingJob",
    "TrainingTask",
    "default_jobs",
    "possible_arms",
    "run_job",
    "train_ranker",
]

VERSION: Final = 1
RANKER: Final = "ranker.safetensors"
RUNGS: Final[Mapping[str, tuple[Tower, ...]]] = {"neutral": ("user", "item")}
"""Towers whose knowledge is left out on each lower rung of the knowledge model."""
WIDE: Final = ("dcnv2", "din")
"""Models that are measured with every arm but `ON_DEMAND`; the others with `DEFAULT_ARMS`."""
ON_DEMAND: Final = ("both_texts", "cf_both_texts")
"""Arms that are measured only when named: the committed table is older than they are."""
COSTS: Final = {"xdeepfm": 9, "dien": 8, "autoint": 4, "fibinet": 3, "din": 2.5, "fignn": 2}
"""Rough duration of a training, relative to models that are not listed; long trainings start first."""


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One training of a quality study."""

    model: str
    arm: str
    fold: int
    seed: int
    ranker: str = ""
    """Rerankers: the model, trained without knowledge, whose order the lists have; empty: their own order."""

    @property
    def cost(self) -> float:
        """Rough duration, relative to other jobs."""
        arm = ARMS[self.arm]
        return COSTS.get(self.model, 1) * (1 + 0.5 * bool(arm.towers) + 2 * arm.learned_affinity)

    def folder(self, work: WorkFolder, protocol: SplitProtocol, encodings: str) -> Path:
        """The folder of its stage."""
        run = f"{self.model}_{self.arm}" + (f"_after_{self.ranker}" if self.ranker else "")
        return work.root / "quality" / encodings / protocol.name / f"fold{self.fold}_seed{self.seed}" / run


class TrainingTask(NamedTuple):
    """A job with everything that a process needs to run it."""

    work: WorkFolder
    protocol: SplitProtocol
    encodings: str
    """Name of the folder with the texts' vectors."""
    job: TrainingJob
    settings: TrainSettings
    """The seed is the job's."""

    def data(self) -> EncodedDataset:
        """The arrays of the job's fold."""
        folder = self.work.dataset
        return _fold_data(folder, folder_hash(folder), self.protocol, self.job.fold)

    def ranker_folder(self) -> Path:
        """The folder of the initial ranker's stage."""
        job = TrainingJob(self.job.ranker, "initial", self.job.fold, self.job.seed)
        return job.folder(self.work, self.protocol, "")


@lru_cache(maxsize=1)
def _fold_data(folder: Path, content: str, protocol: SplitProtocol, fold: int) -> EncodedDataset:
    """One fold's arrays, kept for the next job of this process; `content` is the dataset folder's hash."""
    return encode_dataset(split_dataset(Dataset.load(folder), protocol, fold))


def possible_arms(encodings: Path) -> list[str]:
    """Arms whose texts are in the folder of an encoding stage, in which texts about users may be missing."""
    header = encodings / "knowledge_user.json"
    has_users = header.is_file() and any(json.loads(header.read_text())["text_sha256"])
    return [name for name, arm in ARMS.items() if has_users or "user" not in arm.towers]


def default_jobs(
    models: Sequence[str],
    arms: Sequence[str],
    folds: Sequence[int],
    seeds: Sequence[int],
    ranker: str = "",
    possible: Sequence[str] = tuple(ARMS),
) -> list[TrainingJob]:
    """The jobs of all models, arms, folds and seeds, fold by fold, long trainings first.

    Args:
        models: Names of models; empty: all, or all rerankers behind an initial ranker.
        arms: Names of arms; empty: each model's default arms.
        folds: Folds to test.
        seeds: Seeds of training.
        ranker: The initial ranker of rerankers; empty: none.
        possible: Arms whose texts are encoded.

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
        TrainingJob(model, arm, fold, seed, ranker)
        for model in chosen
        for arm in arms_of(model)
        for fold in folds
        for seed in seeds
    ]
    return sorted(jobs, key=lambda job: (job.seed, job.fold, -job.cost, job.model))


def train_ranker(task: TrainingTask, notify: Callable[[Any], None]) -> StageResult:
    """Train the initial ranker of a job's fold and seed as a stage."""
    job, settings = task.job, replace(task.settings, seed=task.job.seed)

    def build(draft: Path) -> dict[str, Any]:
        trained = train_run(task.data(), task.work.root, Run(job.ranker, "control"), settings, folder=draft)
        save_file({name: value.contiguous() for name, value in trained.model.state_dict().items()}, draft / RANKER)
        (draft / STATE).unlink()
        return {"best_epoch": trained.fitted.best.number}

    inputs = {"dataset": task.work.dataset}
    params = {"protocol": task.protocol.name, "model": job.ranker, "fold": job.fold, **settings.to_json()}
    return run_stage(
        f"initial {job.ranker}", task.ranker_folder(), build, inputs=inputs, params=params, version=VERSION
    )


def _load_ranker(task: TrainingTask, data: EncodedDataset, settings: TrainSettings) -> InitialRanker:
    run = Run(task.job.ranker, "control")
    train = samples_of_split(data, TRAIN)
    inputs = KnowledgeInputs.for_training(ARMS[run.arm], data, train, task.work.root, seed=settings.seed)
    model = new_model(run, data, inputs, settings)
    model.load_state_dict(load_file(task.ranker_folder() / RANKER))
    return InitialRanker(model.eval(), inputs)


def run_job(task: TrainingTask, notify: Callable[[tuple[TrainingJob, int]], None]) -> StageResult:
    """Train and predict one job as a stage; `notify` gets the job and each epoch's number, and 0 at the end.

    An initial ranker of the job must be trained already.
    """
    work, job, settings = task.work, task.job, replace(task.settings, seed=task.job.seed)
    arm = ARMS[job.arm]

    def build(draft: Path) -> dict[str, Any]:
        data = task.data()
        ranker = _load_ranker(task, data, settings) if job.ranker else None
        trained = train_run(
            data,
            work.folder(task.encodings),
            Run(job.model, job.arm),
            settings,
            folder=draft,
            ranker=ranker,
            on_epoch=lambda epoch: notify((job, epoch.number)),
        )
        samples = rows_of_split(data, job.model, TEST, settings.seed)
        order = ranker.order(data, samples) if ranker else torch.arange(len(samples))
        served = trained.knowledge_inputs.as_served()
        inputs = {"": served}
        if job.arm == "knowledge":
            inputs |= {f"_{rung}": served.without_knowledge_of(towers) for rung, towers in RUNGS.items()}
        for suffix, known in inputs.items():
            scores = torch.empty(len(samples))
            scores[order] = torch.sigmoid(predict_logits(trained.model, Batches(data, samples.rows(order), known)))
            np.save(draft / f"predictions{suffix}.npy", scores.numpy())
        (draft / STATE).unlink()
        fitted = trained.fitted
        return {"validation_loss": fitted.best.validation_loss, "best_epoch": fitted.best.number, **trained.sizes}

    sources = {"dataset": work.dataset} | ({"encoding": work.folder(task.encodings)} if arm.texts else {})
    params = {"protocol": task.protocol.name, "model": job.model, "arm": job.arm, "fold": job.fold}
    params |= settings.to_json() | ({"ranker": job.ranker} if job.ranker else {})
    folder = job.folder(work, task.protocol, task.encodings)
    result = run_stage(f"{job.model} {job.arm}", folder, build, inputs=sources, params=params, version=VERSION)
    notify((job, 0))
    return result
