"""Owns the stage `train`: every backbone with every arm, each in a folder of its own, several side by side."""

import time
from collections.abc import Callable, Sequence
from typing import Final

from kar_offline.cli_options import refuse_unknown
from kar_offline.dataset.dataset import Dataset
from kar_offline.knowledge.records import read_knowledge
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.stage_runner import StageResult
from kar_offline.train.arms import ARMS, DEFAULT_ARMS
from kar_offline.train.fit import Epoch
from kar_offline.train.processes import in_processes
from kar_offline.train.report import TrainingReport
from kar_offline.train.run import Run
from kar_offline.train.run_task import RunTask, train_task
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import USER
from kar_sidecar.errors import PreconditionError

__all__ = ["DEFAULT_BACKBONES", "train"]

DEFAULT_BACKBONES: Final = ("dcnv2", "din")
"""Backbones that `kar train` trains by default."""


def train(
    work: WorkFolder,
    backbones: Sequence[str] = DEFAULT_BACKBONES,
    arms: Sequence[str] = DEFAULT_ARMS,
    settings: TrainSettings | None = None,
    *,
    workers: int = 2,
    on_epoch: Callable[[Run, Epoch], None] = lambda run, epoch: None,
) -> StageResult[TrainingReport]:
    """Train every backbone with every arm below `work.training`. Runs that are up to date are skipped.

    Args:
        work: The work folder, with the dataset and, for arms with texts, the encodings.
        backbones: Names of `BACKBONES` or `RERANKERS`.
        arms: Names of `ARMS`.
        settings: Seed and hyperparameters; None takes the defaults.
        workers: Number of worker processes, one thread each. 0 trains in this process with all its threads, together
            with the processes that torchrun started.
        on_epoch: Called in this thread after each epoch of a run.

    Raises:
        InputError: there is no such backbone or arm.
        PreconditionError: an earlier stage is missing, or a text was written from events that are samples.
        UnavailableError: a worker process was killed.
    """
    refuse_unknown("backbone", backbones, (*BACKBONES, *RERANKERS))
    refuse_unknown("arm", arms, ARMS)
    if any(ARMS[arm].texts for arm in arms):
        _refuse_leaks(work)
    # The longest runs start first, so that all processes end at about the same time.
    runs = [Run(backbone, arm) for arm in reversed(arms) for backbone in reversed(backbones)]
    tasks = [RunTask(work, run, settings or TrainSettings()) for run in runs]
    started_s = time.perf_counter()
    results = in_processes(train_task, tasks, workers, lambda notice: on_epoch(*notice))
    finished = {run.name: result for run, result in zip(runs, results, strict=True) if result is not None}
    ran = any(result.ran for result in finished.values())
    duration_s = time.perf_counter() - started_s
    seconds = duration_s if ran else max((result.seconds for result in finished.values()), default=0.0)
    report = TrainingReport({name: result.report for name, result in finished.items()})
    return StageResult("train", work.training, ran, seconds, report)


def _refuse_leaks(work: WorkFolder) -> None:
    """Check that no user's text was written from an event that is now a sample.

    That happens if the dataset is built again after `kar refresh` moved the cut-offs.

    Raises:
        PreconditionError: a text was written from a sample.
    """
    if not (work.knowledge / "user.jsonl").is_file():
        return
    dataset = work.read(Dataset)
    cutoffs = {user.id: int(cutoff) for user, cutoff in zip(dataset.users, dataset.cutoff, strict=True)}
    for record in read_knowledge(work.knowledge, USER):
        if record.text and record.history_cutoff > cutoffs.get(record.id, record.history_cutoff):
            raise PreconditionError(
                f"the text about user {record.id!r} was written from {record.history_cutoff} events, but the dataset "
                f"has samples from event {cutoffs[record.id] + 1} on (leakage): run `kar refresh` with its files "
                "again, or generate and encode again"
            )
