"""Owns the training runs: each backbone with each arm is a stage of its own, some of them side by side."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import TRAIN, VALIDATION
from kar_offline.knowledge.records import read_knowledge
from kar_offline.models import BACKBONES, RERANKERS, CTRModel
from kar_offline.stage_runner import StageResult, draft_of, folder_hash, run_stage
from kar_offline.train.arms import ARMS, DEFAULT_ARMS, Arm
from kar_offline.train.batches import BatchFeed
from kar_offline.train.checkpoint import build_model, run_folder, save_trained
from kar_offline.train.distributed import Ranks
from kar_offline.train.features import EncodedDataset, Samples, encode_dataset
from kar_offline.train.fit import STATE, Epoch, Fitted, TrainSettings, fit, predict_logits
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.learning_curves import write_curves
from kar_offline.train.processes import in_processes
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["DEFAULT_BACKBONES", "InitialRanker", "Run", "Trained", "new_model", "rows", "train", "train_run"]

DEFAULT_BACKBONES: Final = ("dcnv2", "din")
"""What `kar train` makes unless told otherwise."""
VERSION: Final = 2


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


@dataclass(frozen=True, slots=True)
class Trained:
    """A fitted model and what it was made from."""

    fitted: Fitted
    given: KnowledgeInputs
    adaptor: Mapping[str, Any] | None
    """Arguments of `build_model`."""
    sizes: Mapping[str, int]
    """Rows of each split."""

    @property
    def model(self) -> CTRModel:
        """The model with its best weights, in evaluation mode."""
        return self.fitted.model


@dataclass(frozen=True, slots=True)
class InitialRanker:
    """A trained model of single rows, in whose order a reranker finds its lists."""

    model: CTRModel
    given: KnowledgeInputs

    def order(self, data: EncodedDataset, lists: Samples) -> Tensor:
        """Row numbers [S] of `lists`, list by list, best first; ties as they lie."""
        alone = replace(lists, list_length=1)
        logits = predict_logits(self.model, BatchFeed.of(data, alone, self.given)).view(-1, lists.list_length)
        best_first = logits.sort(dim=1, descending=True, stable=True).indices
        return (best_first + torch.arange(0, len(lists), lists.list_length).unsqueeze(1)).flatten()


def _adaptor(arm: Arm, given: KnowledgeInputs, settings: TrainSettings) -> dict[str, Any] | None:
    """Arguments of the arm's adaptor (see `build_model`); None for an arm without towers."""
    if not arm.towers or given.texts is None:
        return None
    shape: dict[str, Any] = {"dim": given.texts.dim, "towers": arm.towers}
    if arm.adaptor == "none":
        return shape
    shared, dedicated = settings.shared_experts, settings.dedicated_experts
    experts = {
        "hybrid": {"shared": shared, "dedicated": dedicated},
        "moe": {"shared": shared + dedicated, "dedicated": 0, "one_gate": True},
        "mlp": {"shared": 1, "dedicated": 0, "one_gate": True},
    }[arm.adaptor]
    return {**shape, "hidden": settings.expert_hidden, "out": settings.knowledge_width, **experts}


def train_run(
    data: EncodedDataset,
    encodings: Path,
    run: Run,
    settings: TrainSettings,
    *,
    folder: Path,
    ranker: InitialRanker | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Train one run on the training split, choosing its epoch on the validation split.

    Args:
        data: The dataset and its splits.
        encodings: Folder of the encoding stage, for arms with texts.
        run: Backbone and arm. Rerankers learn from lists.
        settings: Seed and hyperparameters.
        folder: Where the state to resume from lies; see `fit`.
        ranker: Puts a reranker's lists in order.
        on_epoch: Called after each epoch.

    Raises:
        PreconditionError: the arm's texts are not encoded, or a split is empty.
    """
    arm = ARMS[run.arm]
    samples, held_out = (rows(data, run.backbone, split, settings.seed) for split in (TRAIN, VALIDATION))
    if not len(samples) or not len(held_out):
        raise PreconditionError("the dataset has no training or no validation samples: build it with more users")
    if ranker:
        samples, held_out = (part.rows(ranker.order(data, part)) for part in (samples, held_out))
    given = KnowledgeInputs.of(arm, data, samples, encodings, seed=settings.seed)
    # By time, a validation row's user may also be in training; it is scored as serving would score it.
    train_feed, validation_feed = BatchFeed.of(data, samples, given), BatchFeed.of(data, held_out, given.as_served())
    make = partial(new_model, run, data, given, settings)
    fitted = fit(make, train_feed, validation_feed, settings, folder=folder, on_epoch=on_epoch)
    sizes = {"train": len(samples), "validation": len(held_out)}
    return Trained(fitted, given, _adaptor(arm, given, settings), sizes)


def new_model(run: Run, data: EncodedDataset, given: KnowledgeInputs, settings: TrainSettings) -> CTRModel:
    """The model of a run with initial weights from torch's current random state."""
    adaptor = _adaptor(ARMS[run.arm], given, settings)
    width = (adaptor.get("out") or adaptor["dim"]) if adaptor else 0
    return build_model(run.backbone, given.spec(data.spec, width), data.categories, adaptor)


def rows(data: EncodedDataset, backbone: str, split: int, seed: int) -> Samples:
    """What a backbone scores of one split: single samples, or lists for a reranker."""
    return data.lists(split, seed=seed) if backbone in RERANKERS else data.samples(split)


@lru_cache(maxsize=1)
def _encoded(folder: Path, content: str) -> EncodedDataset:
    """Arrays of one dataset, kept for this process' next run; `content` is the folder's hash."""
    return encode_dataset(Dataset.load(folder))


def _data(work: WorkFolder) -> EncodedDataset:
    return _encoded(work.dataset, folder_hash(work.dataset))


def _train_one(
    work: WorkFolder, run: Run, settings: TrainSettings, on_epoch: Callable[[Epoch], None], draft: Path
) -> dict[str, Any]:
    """Train one run into `draft` and report on its validation split."""
    data = _data(work)
    trained = train_run(data, work.encoding, run, settings, folder=draft, on_epoch=on_epoch)
    fitted, given = trained.fitted, trained.given
    metrics = {
        "validation_loss": fitted.best.validation_loss,
        "best_epoch": fitted.best.number,
        "epochs": [epoch.to_json() for epoch in fitted.epochs],
        "samples": trained.sizes,
    }
    identity = {
        "backbone": run.backbone,
        "arm": run.arm,
        "spec": trained.model.backbone.spec.to_json(),
        "adaptor": trained.adaptor,
        "encoder_id": given.texts.encoder_id if given.texts else "",
        "settings": settings.to_json(),
    }
    save_trained(draft, fitted.weights, data.features, given.affinity, identity=identity, metrics=metrics)
    write_curves(draft, fitted.epochs)
    (draft / STATE).unlink()
    return {**metrics, "epochs": len(fitted.epochs)}


def _stage(
    task: tuple[WorkFolder, Run, TrainSettings], notify: Callable[[tuple[Run, Epoch]], None]
) -> StageResult | None:
    """One run as a stage; its epochs go to `notify`. None in the processes that only help the first one."""
    work, run, settings = task
    folder, ranks = run_folder(work, run.backbone, run.arm), Ranks.current()
    inputs = {"dataset": work.dataset} | ({"encoding": work.encoding} if ARMS[run.arm].texts else {})
    params = {"backbone": run.backbone, "arm": run.arm, **settings.to_json()}
    if not ranks.first:
        if ranks.agree():
            train_run(_data(work), work.encoding, run, settings, folder=draft_of(folder))
        return None

    def build(draft: Path) -> dict[str, Any]:
        ranks.agree(True)
        return _train_one(work, run, settings, lambda epoch: notify((run, epoch)), draft)

    result = run_stage(f"train {run.name}", folder, build, inputs=inputs, params=params, version=VERSION)
    if not result.ran:
        ranks.agree(False)
    return result


def _refuse_leaks(work: WorkFolder) -> None:
    """Check that no user's text knows a sample, as it does where the dataset was built again after `kar refresh`."""
    if not (work.knowledge / "user.jsonl").is_file():
        return
    dataset = work.read(Dataset)
    cutoffs = {user.id: int(cutoff) for user, cutoff in zip(dataset.users, dataset.cutoff, strict=True)}
    for record in read_knowledge(work.knowledge, "user"):
        if record.text and record.history_cutoff > cutoffs.get(record.id, record.history_cutoff):
            raise PreconditionError(
                f"the text about user {record.id!r} was written from {record.history_cutoff} events, of which the "
                f"dataset has those after the first {cutoffs[record.id]} as samples (leakage): run `kar refresh` with "
                "its files again, or generate and encode again"
            )


def train(
    work: WorkFolder,
    backbones: Sequence[str] = DEFAULT_BACKBONES,
    arms: Sequence[str] = DEFAULT_ARMS,
    settings: TrainSettings | None = None,
    *,
    workers: int = 2,
    on_epoch: OnEpoch = lambda run, epoch: None,
) -> StageResult:
    """Train every backbone with every arm below `work`/training; runs that are up to date are left alone.

    Args:
        work: Holds `dataset` and, for arms with text, `encoding`.
        backbones: Names of the registry.
        arms: Names of `ARMS`.
        settings: Seed and hyperparameters; None for the defaults.
        workers: Processes side by side, one thread each; 0 trains in this process with its thread count, together with
            those that torchrun started.
        on_epoch: Called in this thread after each epoch of a run.

    Raises:
        InputError: an unknown backbone or arm.
        PreconditionError: an earlier stage is missing, or a text was written from events that are samples.
        UnavailableError: a worker process was killed.
    """
    for kind, names, known in (("backbone", backbones, (*BACKBONES, *RERANKERS)), ("arm", arms, tuple(ARMS))):
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"{kind} {unknown[0]!r} is not known: choose from {', '.join(known)}")
    if any(ARMS[arm].texts for arm in arms):
        _refuse_leaks(work)
    settings = settings or TrainSettings()
    # The longest first, so that the processes end together.
    runs = [Run(backbone, arm) for arm in reversed(arms) for backbone in reversed(backbones)]
    began = time.perf_counter()
    tasks = [(work, run, settings) for run in runs]
    results = [r for r in in_processes(_stage, tasks, workers, lambda notice: on_epoch(*notice)) if r is not None]
    report = {run.name: result.report for run, result in zip(runs, results, strict=False)}
    ran = any(result.ran for result in results)
    seconds = time.perf_counter() - began if ran else max((r.seconds for r in results), default=0.0)
    return StageResult("train", work.training, ran, seconds, {"runs": report})
