"""Owns the optimisation of one model: batches, clipping, early stopping, resuming after the last finished epoch."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from kar_offline.models import CTRModel, Knowledge
from kar_offline.train.features import EncodedDataset, Samples
from kar_offline.train.vectors import TextVectors

__all__ = ["STATE", "Epoch", "Fitted", "TrainSettings", "fit", "predict_logits"]

STATE: Final = "state.safetensors"
EVALUATION_BATCH: Final = 2048


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How models are trained; the same for every backbone and arm."""

    seed: int = 0
    """Of initial weights, batches and dropout."""
    epochs: int = 20
    """At most."""
    patience: int = 2
    """Epochs without a better validation LogLoss before training stops."""
    batch: int = 256
    """Samples a step."""
    learning_rate: float = 5e-4
    weight_decay: float = 1e-2
    """Decoupled (AdamW); a step shrinks weights by this times the learning rate."""
    clip_norm: float = 0.5
    """Largest norm of all gradients together; `metrics.json` tells what share of the steps it touched."""
    knowledge_dropout: float = 0.1
    """Probability that an entity of a batch gets its neutral vector; likewise that a sample's user and item both do."""
    shared_experts: int = 2
    dedicated_experts: int = 5
    """A tower."""
    expert_hidden: int = 128
    """Width of an expert's first layer."""
    knowledge_width: int = 32
    """Components of a knowledge vector."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch (counted from 1) gave; losses are mean LogLoss in nats, `clipped_ratio` the share of steps."""

    number: int
    train_logloss: float
    validation_logloss: float
    clipped_ratio: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The weights of the epoch with the lowest validation LogLoss, and all epochs."""

    weights: Mapping[str, Tensor]
    epochs: tuple[Epoch, ...]

    @property
    def best(self) -> Epoch:
        """The epoch that `weights` come from."""
        return min(self.epochs, key=lambda epoch: epoch.validation_logloss)


def _knowledge(vectors: TextVectors, user: Tensor, item: Tensor, dropout: float) -> Knowledge:
    """Knowledge of a batch after dropout of whole entities, and of both entities of single samples."""
    neither = torch.rand(len(user)) < dropout
    parts: list[Tensor] = []
    towers = (user, vectors.user, vectors.user_present), (item, vectors.item, vectors.item_present)
    for rows, encoding, present in towers:
        distinct, row = torch.unique(rows, return_inverse=True)
        kept = present[distinct] & (torch.rand(len(distinct)) >= dropout)
        # One more entity, of which nothing is known, stands in where neither side is.
        nobody = encoding.new_zeros(1, encoding.shape[1]), kept.new_zeros(1)
        encoded, known = torch.cat([encoding[distinct], nobody[0]]), torch.cat([kept, nobody[1]])
        parts += [encoded, known, row.masked_fill(neither, len(distinct))]
    return Knowledge(*parts)


@torch.no_grad()
def predict_logits(model: CTRModel, data: EncodedDataset, samples: Samples, vectors: TextVectors | None) -> Tensor:
    """Log-odds [S] of all samples, in evaluation mode; every user and item passes through the adaptor once."""
    model.eval()
    adapted: dict[str, tuple[Tensor, Tensor]] = {}
    if model.adaptor is not None and vectors is not None:
        adapted = {
            "user_knowledge": (model.adaptor.adapt(vectors.user, vectors.user_present, "user"), samples.user),
            "item_knowledge": (model.adaptor.adapt(vectors.item, vectors.item_present, "item"), samples.item),
        }
    logits = []
    for at in torch.arange(len(samples)).split(EVALUATION_BATCH):
        knowledge = {name: table[rows[at]] for name, (table, rows) in adapted.items()}
        logits.append(model({**data.inputs(samples, at), **knowledge}))
    return torch.cat(logits)


def _epoch(
    model: CTRModel,
    optimiser: torch.optim.Optimizer,
    data: EncodedDataset,
    samples: Samples,
    vectors: TextVectors | None,
    settings: TrainSettings,
) -> tuple[float, float]:
    """One pass over the samples in random order; returns its mean loss and the share of clipped steps."""
    model.train()
    parameters = list(model.parameters())
    total, clipped, steps = 0.0, 0, 0
    for at in torch.randperm(len(samples)).split(settings.batch):
        knowledge = None
        if vectors is not None:
            knowledge = _knowledge(vectors, samples.user[at], samples.item[at], settings.knowledge_dropout)
        logits = model(data.inputs(samples, at), knowledge)
        loss = F.binary_cross_entropy_with_logits(logits, samples.label[at])
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm, foreach=True)
        optimiser.step()
        total += loss.item() * len(at)
        clipped += int(norm > settings.clip_norm)
        steps += 1
    return total / len(samples), clipped / steps


def _save_state(
    path: Path, model: CTRModel, optimiser: torch.optim.Optimizer, best: Mapping[str, Tensor], epochs: list[Epoch]
) -> None:
    moments = optimiser.state_dict()["state"]
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    tensors |= {f"optimiser/{i}/{key}": value for i, state in moments.items() for key, value in state.items()}
    draft = path.with_suffix(".draft")
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        draft,
        {"epochs": json.dumps([epoch.to_json() for epoch in epochs])},
    )
    draft.replace(path)


def _load_state(path: Path, model: CTRModel, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[Epoch]]:
    """Put model and optimiser back to the end of the last finished epoch; returns best weights and epochs."""
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimiser": {}}
    with safe_open(path, framework="pt") as file:
        epochs = [Epoch(**values) for values in json.loads(file.metadata()["epochs"])]
        for key in file.keys():  # noqa: SIM118 - not a mapping
            group, name = key.split("/", 1)
            groups[group][name] = file.get_tensor(key)
    model.load_state_dict(groups["model"])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in groups["optimiser"].items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return groups["best"], epochs


def fit(
    make: Callable[[], CTRModel],
    data: EncodedDataset,
    train: Samples,
    validation: Samples,
    vectors: TextVectors | None,
    settings: TrainSettings,
    *,
    folder: Path,
    on_epoch: Callable[[Epoch], None],
) -> Fitted:
    """Train a model made by `make` until validation LogLoss stops falling.

    After each epoch the state goes to `folder`, where a later call with the same arguments goes on from it. Random
    numbers depend on seed and epoch only, so on one thread a resumed run ends bit for bit like an unbroken one; the
    caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = make()
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        best: dict[str, Tensor] = {}
        epochs: list[Epoch] = []
        if (folder / STATE).is_file():
            best, epochs = _load_state(folder / STATE, model, optimiser)
            for epoch in epochs:
                on_epoch(epoch)
        while _goes_on(epochs, settings):
            torch.manual_seed(settings.seed * 1_000 + len(epochs) + 1)
            loss, clipped = _epoch(model, optimiser, data, train, vectors, settings)
            logits = predict_logits(model, data, validation, vectors)
            held_out = F.binary_cross_entropy_with_logits(logits, validation.label).item()
            if not math.isfinite(held_out):
                raise FloatingPointError("training diverged: lower the learning rate")
            if held_out < min((epoch.validation_logloss for epoch in epochs), default=math.inf):
                best = {name: value.clone() for name, value in model.state_dict().items()}
            epochs.append(Epoch(len(epochs) + 1, loss, held_out, clipped))
            _save_state(folder / STATE, model, optimiser, best, epochs)
            on_epoch(epochs[-1])
    return Fitted(best, tuple(epochs))


def _goes_on(epochs: list[Epoch], settings: TrainSettings) -> bool:
    if not epochs:
        return True
    best = min(epochs, key=lambda epoch: epoch.validation_logloss)
    return len(epochs) < settings.epochs and len(epochs) - best.number < settings.patience
