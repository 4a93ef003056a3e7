"""Owns the training runs: each backbone with each arm is a stage of its own, some of them side by side."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from signal import SIG_BLOCK, SIG_IGN, SIGINT, pthread_sigmask, signal
from threading import Thread
from typing import Any, Final

import torch

from kar_offline.dataset.samples import TRAIN, VALIDATION, Dataset
from kar_offline.models import BACKBONES, CTRModel
from kar_offline.stage import StageResult, folder_hash, run_stage
from kar_offline.train.checkpoint import ARMS, CONTROL, TEXT_SOURCES, build_model, run_folder, save_trained
from kar_offline.train.features import EncodedDataset, Samples, encode_dataset
from kar_offline.train.fit import STATE, Epoch, TrainSettings, fit
from kar_offline.train.vectors import load_text_vectors
from kar_sidecar.errors import InputError, UnavailableError

__all__ = ["Run", "train"]

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One model to train."""

    backbone: str
    arm: str

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.backbone}_{self.arm}"


OnEpoch = Callable[[Run, Epoch], None]


@lru_cache(maxsize=1)
def _encoded(folder: Path, content: str) -> tuple[EncodedDataset, Samples, Samples]:
    """Arrays of one dataset, kept for this process' next run; `content` is the folder's hash."""
    data = encode_dataset(Dataset.load(folder))
    return data, data.samples(TRAIN), data.samples(VALIDATION)


def _train_one(work: Path, run: Run, settings: TrainSettings, on_epoch: OnEpoch, draft: Path) -> dict[str, Any]:
    """Train one run into `draft` and report on its validation split."""
    data, train, validation = _encoded(work / "dataset", folder_hash(work / "dataset"))
    vectors, adaptor = None, None
    if run.arm != CONTROL:
        vectors = load_text_vectors(work / "encoding", TEXT_SOURCES[run.arm], data.dataset)
        experts = {"shared": settings.shared_experts, "dedicated": settings.dedicated_experts}
        adaptor = {"dim": vectors.dim, "hidden": settings.expert_hidden, "out": settings.knowledge_width, **experts}
    spec = replace(data.spec, knowledge=adaptor["out"] if adaptor else 0)

    def make() -> CTRModel:
        return build_model(run.backbone, spec, data.categories, adaptor)

    fitted = fit(
        make, data, train, validation, vectors, settings, folder=draft, on_epoch=lambda epoch: on_epoch(run, epoch)
    )
    metrics = {
        "validation_logloss": fitted.best.validation_logloss,
        "best_epoch": fitted.best.number,
        "epochs": [epoch.to_json() for epoch in fitted.epochs],
        "samples": {"train": len(train), "validation": len(validation)},
    }
    identity = {
        "backbone": run.backbone,
        "arm": run.arm,
        "spec": spec.to_json(),
        "adaptor": adaptor,
        "encoder_id": vectors.encoder_id if vectors else "",
        "settings": settings.to_json(),
    }
    save_trained(draft, fitted.weights, data.features, identity=identity, metrics=metrics)
    (draft / STATE).unlink()
    return {**metrics, "epochs": len(fitted.epochs)}


_epochs: Any = None


def _end_with_parent() -> None:
    """End this process when its parent was killed: an orphan would write beside the next run."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _start_worker(epochs: Any) -> None:
    """Prepare a worker process: one thread, interrupts left to the parent, no life without it."""
    global _epochs
    _epochs = epochs
    Thread(target=_end_with_parent, daemon=True).start()
    signal(SIGINT, SIG_IGN)
    torch.set_num_threads(1)


def _train_in_worker(work: Path, run: Run, settings: TrainSettings, draft: Path) -> dict[str, Any]:
    return _train_one(work, run, settings, lambda run, epoch: _epochs.put((run, epoch)), draft)


def _stage(work: Path, run: Run, settings: TrainSettings, build: Callable[[Path], dict[str, Any]]) -> StageResult:
    inputs = {"dataset": work / "dataset"} | ({} if run.arm == CONTROL else {"encoding": work / "encoding"})
    params = {"backbone": run.backbone, "arm": run.arm, **settings.to_json()}
    folder = run_folder(work, run.backbone, run.arm)
    return run_stage(f"train {run.name}", folder, build, inputs=inputs, params=params, version=VERSION)


def _in_processes(
    work: Path, runs: Sequence[Run], settings: TrainSettings, workers: int, on_epoch: OnEpoch
) -> list[StageResult]:
    """Stages run in threads here; what they have to build, in `workers` spawned processes."""
    context = multiprocessing.get_context("spawn")
    epochs = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (epochs,)) as processes,
        ThreadPoolExecutor(workers, initializer=pthread_sigmask, initargs=(SIG_BLOCK, {SIGINT})) as threads,
    ):

        def build(run: Run) -> Callable[[Path], dict[str, Any]]:
            return lambda draft: processes.submit(_train_in_worker, work, run, settings, draft).result()

        futures = [threads.submit(_stage, work, run, settings, build(run)) for run in runs]
        try:
            running = set(futures)
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                while not epochs.empty():
                    on_epoch(*epochs.get())
                for future in done:
                    future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
        return [future.result() for future in futures]


def train(
    work: Path,
    backbones: Sequence[str] = tuple(BACKBONES),
    arms: Sequence[str] = ARMS,
    settings: TrainSettings | None = None,
    *,
    workers: int = 2,
    on_epoch: OnEpoch = lambda run, epoch: None,
) -> StageResult:
    """Train every backbone with every arm below `work`/training; runs that are up to date are left alone.

    Args:
        work: Holds `dataset` and, for arms with text, `encoding`.
        backbones: Names of the registry.
        arms: "control" (no knowledge), "raw_text" and "knowledge" (the adaptor over that text source).
        settings: Seed and hyperparameters; None for the defaults.
        workers: Processes side by side, one thread each; 0 trains in this process with its thread count.
        on_epoch: Called in this thread after each epoch of a run.

    Raises:
        InputError: an unknown backbone or arm.
        PreconditionError: an earlier stage is missing.
        UnavailableError: a worker process was killed.
    """
    for kind, names, known in (("backbone", backbones, tuple(BACKBONES)), ("arm", arms, ARMS)):
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"{kind} {unknown[0]!r} is not known: choose from {', '.join(known)}")
    settings = settings or TrainSettings()
    # The longest first, so that the processes end together.
    runs = [Run(backbone, arm) for arm in reversed(ARMS) if arm in arms for backbone in reversed(backbones)]
    began = time.perf_counter()
    if workers:
        try:
            results = _in_processes(work, runs, settings, workers, on_epoch)
        except BrokenProcessPool as error:
            raise UnavailableError(
                "a training process was killed (out of memory?): run the same command to go on"
            ) from error
    else:
        results = [_stage(work, run, settings, partial(_train_one, work, run, settings, on_epoch)) for run in runs]
    report = {run.name: result.report for run, result in zip(runs, results, strict=True)}
    ran = any(result.ran for result in results)
    seconds = time.perf_counter() - began if ran else max((r.seconds for r in results), default=0.0)
    return StageResult("train", work / "training", ran, seconds, {"runs": report})
