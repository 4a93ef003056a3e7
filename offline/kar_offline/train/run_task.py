"""Owns one training run as a task: whether it is up to date, its training, and the files of its folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from kar_offline.dataset.dataset import Dataset
from kar_offline.stage_runner import StageResult, draft_of, folder_hash, run_stage
from kar_offline.train.arms import ARMS
from kar_offline.train.checkpoint import run_folder, save_trained
from kar_offline.train.distributed import ProcessGroup
from kar_offline.train.features import EncodedDataset, encode_dataset
from kar_offline.train.fit import STATE, Epoch
from kar_offline.train.learning_curves import write_curves
from kar_offline.train.report import RunReport
from kar_offline.train.run import Run, train_run
from kar_offline.train.settings import TrainSettings
from kar_offline.work_folder import WorkFolder

__all__ = ["RunTask", "train_task"]

VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class RunTask:
    """One run to train below a work folder."""

    work: WorkFolder
    run: Run
    settings: TrainSettings


def train_task(task: RunTask, notify: Callable[[tuple[Run, Epoch]], None]) -> StageResult[RunReport] | None:
    """Train a run unless its folder is up to date.

    Args:
        task: The run.
        notify: Called with the run after each epoch.

    Returns:
        The result in the first process of a group; None in the others, which help to train but write nothing.

    Raises:
        PreconditionError: an earlier stage is missing, or a split is empty.
    """
    work, run, group = task.work, task.run, ProcessGroup.current()
    folder = run_folder(work, run.backbone, run.arm)
    if not group.is_first:
        if group.broadcast():
            train_run(_read_encoded(work), work.encoding, run, task.settings, folder=draft_of(folder))
        return None

    def build(draft: Path) -> RunReport:
        group.broadcast(True)
        return _train_into(draft, task, lambda epoch: notify((run, epoch)))

    inputs = {"dataset": work.dataset} | ({"encoding": work.encoding} if ARMS[run.arm].texts else {})
    params = {"backbone": run.backbone, "arm": run.arm, **task.settings.to_json()}
    name = f"train {run.name}"
    result = run_stage(name, folder, build, inputs=inputs, params=params, version=VERSION, report_type=RunReport)
    if not result.ran:
        group.broadcast(False)
    return result


def _train_into(draft: Path, task: RunTask, on_epoch: Callable[[Epoch], None]) -> RunReport:
    """Train a run and write its files into the draft folder."""
    data = _read_encoded(task.work)
    trained = train_run(data, task.work.encoding, task.run, task.settings, folder=draft, on_epoch=on_epoch)
    fitted, knowledge_inputs = trained.fitted, trained.knowledge_inputs
    best = fitted.best
    metrics = {
        "validation_loss": best.validation_loss,
        "best_epoch": best.number,
        "epochs": [epoch.to_json() for epoch in fitted.epochs],
        "samples": trained.sizes,
    }
    identity = {
        "backbone": task.run.backbone,
        "arm": task.run.arm,
        "spec": trained.model.backbone.spec.to_json(),
        "adaptor": trained.adaptor,
        "encoder_id": knowledge_inputs.texts.encoder_id if knowledge_inputs.texts else "",
        "settings": task.settings.to_json(),
    }
    save_trained(draft, fitted.weights, data.features, knowledge_inputs.affinity, identity=identity, metrics=metrics)
    write_curves(draft, fitted.epochs)
    (draft / STATE).unlink()
    return RunReport(best.validation_loss, best.number, len(fitted.epochs), dict(trained.sizes))


def _read_encoded(work: WorkFolder) -> EncodedDataset:
    return _encode(work, folder_hash(work.dataset))


@lru_cache(maxsize=1)
def _encode(work: WorkFolder, content_hash: str) -> EncodedDataset:
    """The encoded dataset, kept for the next run of this process; the hash is part of the cache's key."""
    return encode_dataset(work.read(Dataset))
