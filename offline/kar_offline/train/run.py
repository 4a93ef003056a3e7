"""Owns one training run: the backbone, arm and rows that are trained together, and the model that comes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kar_offline.dataset.splits import TRAIN, VALIDATION
from kar_offline.models import RERANKERS, CTRModel
from kar_offline.train.arms import ARMS, Arm
from kar_offline.train.batches import Batches
from kar_offline.train.checkpoint import build_model
from kar_offline.train.features import EncodedDataset
from kar_offline.train.fit import Epoch, FittedModel, fit
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.predict import predict_logits
from kar_offline.train.samples import Samples, lists_of_split, samples_of_split
from kar_offline.train.settings import TrainSettings
from kar_sidecar.errors import PreconditionError

__all__ = ["InitialRanker", "Run", "TrainedRun", "new_model", "rows_of_split", "train_run"]


@dataclass(frozen=True, slots=True)
class Run:
    """One model to train."""

    backbone: str
    """A name of `BACKBONES` or `RERANKERS`."""
    arm: str
    """A name of `ARMS`."""

    @property
    def name(self) -> str:
        """Backbone and arm, such as "dcnv2_knowledge"; the name of the run's folder."""
        return f"{self.backbone}_{self.arm}"


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A fitted model with its inputs."""

    fitted: FittedModel
    knowledge_inputs: KnowledgeInputs
    adaptor: Mapping[str, Any] | None
    """The adaptor's arguments, see `build_model`; None for an arm without encodings."""
    sizes: Mapping[str, int]
    """Number of rows by split."""

    @property
    def model(self) -> CTRModel:
        """The model with its best weights, in evaluation mode."""
        return self.fitted.model


@dataclass(frozen=True, slots=True)
class InitialRanker:
    """A trained model of independent rows, which puts the lists of a reranker in their initial order."""

    model: CTRModel
    knowledge_inputs: KnowledgeInputs

    def order(self, data: EncodedDataset, lists: Samples) -> Tensor:
        """Row numbers [S] of all lists, each list by falling score; ties keep their order."""
        independent = replace(lists, list_length=1)
        logits = predict_logits(self.model, Batches(data, independent, self.knowledge_inputs))
        order = logits.view(-1, lists.list_length).sort(dim=1, descending=True, stable=True).indices
        return (order + torch.arange(0, len(lists), lists.list_length).unsqueeze(1)).flatten()


def rows_of_split(data: EncodedDataset, backbone: str, split: int, seed: int) -> Samples:
    """The rows that a backbone scores: lists, drawn with `seed`, for a reranker; else independent samples."""
    return lists_of_split(data, split, seed=seed) if backbone in RERANKERS else samples_of_split(data, split)


def new_model(run: Run, data: EncodedDataset, knowledge_inputs: KnowledgeInputs, settings: TrainSettings) -> CTRModel:
    """The model of a run with fresh weights, drawn from torch's global random state."""
    adaptor = _adaptor_arguments(ARMS[run.arm], knowledge_inputs, settings)
    width = (adaptor.get("out") or adaptor["dim"]) if adaptor else 0
    return build_model(run.backbone, knowledge_inputs.spec(data.spec, width), data.categories, adaptor)


def _adaptor_arguments(arm: Arm, knowledge_inputs: KnowledgeInputs, settings: TrainSettings) -> dict[str, Any] | None:
    """The adaptor's arguments, see `build_model`; None for an arm without encodings."""
    if not arm.towers or knowledge_inputs.texts is None:
        return None
    arguments: dict[str, Any] = {"dim": knowledge_inputs.texts.dim, "towers": arm.towers}
    if arm.adaptor == "none":
        return arguments
    shared, dedicated = settings.shared_experts, settings.dedicated_experts
    experts = {
        "hybrid": {"shared": shared, "dedicated": dedicated},
        "moe": {"shared": shared + dedicated, "dedicated": 0, "one_gate": True},
        "mlp": {"shared": 1, "dedicated": 0, "one_gate": True},
    }[arm.adaptor]
    return {**arguments, "hidden": settings.expert_hidden, "out": settings.knowledge_width, **experts}


def train_run(
    data: EncodedDataset,
    encodings: Path,
    run: Run,
    settings: TrainSettings,
    *,
    folder: Path,
    ranker: InitialRanker | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> TrainedRun:
    """Train one model on the training split; the validation split chooses its epoch.

    Args:
        data: The dataset with its splits.
        encodings: Folder of the encoding stage; only arms with texts read it.
        run: Backbone and arm.
        settings: Seed and hyperparameters.
        folder: Folder of the state that an interrupted run resumes from, see `fit`.
        ranker: Puts a reranker's lists in their initial order; None keeps their random order.
        on_epoch: Called after each epoch.

    Raises:
        PreconditionError: the arm's texts are not encoded, or a split is empty.
    """
    train = rows_of_split(data, run.backbone, TRAIN, settings.seed)
    validation = rows_of_split(data, run.backbone, VALIDATION, settings.seed)
    if not len(train) or not len(validation):
        raise PreconditionError("the dataset has no training or no validation samples: build it with more users")
    if ranker:
        train, validation = (rows.rows(ranker.order(data, rows)) for rows in (train, validation))
    arm = ARMS[run.arm]
    knowledge_inputs = KnowledgeInputs.for_training(arm, data, train, encodings, seed=settings.seed)
    train_batches = Batches(data, train, knowledge_inputs)
    # In a split by time, users with validation rows may have training rows, too. They are scored as in serving.
    validation_batches = Batches(data, validation, knowledge_inputs.as_served())
    make = partial(new_model, run, data, knowledge_inputs, settings)
    fitted = fit(make, train_batches, validation_batches, settings, folder=folder, on_epoch=on_epoch)
    sizes = {"train": len(train), "validation": len(validation)}
    return TrainedRun(fitted, knowledge_inputs, _adaptor_arguments(arm, knowledge_inputs, settings), sizes)
