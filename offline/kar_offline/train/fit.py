"""Owns the optimisation of one model: batches, schedule, clipping, early stopping, resuming where it was stopped."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kar_offline.models import CTRModel
from kar_offline.train.batches import BatchFeed
from kar_offline.train.distributed import Ranks
from kar_offline.train.knowledge_inputs import KnowledgeInputs

__all__ = ["STATE", "Epoch", "Fitted", "TrainSettings", "fit", "knowledge_vectors", "predict_logits"]

STATE: Final = "state.safetensors"
EVALUATION_BATCH: Final = 2048
ADAPTED_ROWS: Final = 2**16
"""Entities that the adaptor takes at once."""
SAVE_EVERY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How models are trained; the same for every backbone and arm."""

    seed: int = 0
    """Of initial weights, batches, dropout, permuted texts and cross-fitting."""
    epochs: int = 20
    """At most."""
    patience: int = 2
    """Epochs without a better validation loss before training stops."""
    batch: int = 512
    """Rows a step."""
    learning_rate: float = 1e-3
    """At the end of the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay: float = 1.0
    """What each finished epoch multiplies the learning rate by."""
    weight_decay: float = 1e-2
    """Decoupled (AdamW); a step shrinks weights by this times the learning rate."""
    clip_norm: float = 0.5
    """Largest norm of all gradients together; `metrics.json` tells what share of the steps it touched."""
    knowledge_dropout: float = 0.1
    """Probability that nothing is known of an entity of a batch, and of everybody in a request."""
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
    """What one epoch (counted from 1) gave; losses are the model's mean loss, `clipped_ratio` the share of steps."""

    number: int
    train_loss: float
    validation_loss: float
    clipped_ratio: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model with the weights of the epoch of lowest validation loss, in evaluation mode, and all epochs."""

    model: CTRModel
    epochs: tuple[Epoch, ...]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The kept weights by name, on the CPU."""
        return self.model.state_dict()

    @property
    def best(self) -> Epoch:
        """The epoch that the weights come from."""
        return min(self.epochs, key=lambda epoch: epoch.validation_loss)


@torch.no_grad()
def knowledge_vectors(model: CTRModel, given: KnowledgeInputs) -> dict[str, Tensor]:
    """What is prestored: the adaptor's output [entities, out] of every user and item, by tower."""
    if model.adaptor is None:
        return {}
    device = next(model.parameters()).device
    tables: dict[str, Tensor] = {}
    for tower in model.adaptor.towers:
        vectors, present = given.known(tower)
        parts = zip(vectors.split(ADAPTED_ROWS), present.split(ADAPTED_ROWS), strict=True)
        tables[tower] = torch.cat([model.adaptor.adapt({tower: (v.to(device), p.to(device))})[tower] for v, p in parts])
    return tables


@torch.no_grad()
def predict_logits(model: CTRModel, feed: BatchFeed, tables: Mapping[str, Tensor] | None = None) -> Tensor:
    """Log-odds [S] of all rows, in evaluation mode; `tables` are the `knowledge_vectors`, by default made here."""
    model.eval()
    device = next(model.parameters()).device
    step = feed.samples.list_length
    rows = {"user": feed.samples.user, "item": feed.samples.item}
    tables = knowledge_vectors(model, feed.given) if tables is None else tables
    logits = []
    for at in feed.in_order(EVALUATION_BATCH):
        own = {tower: rows[tower][at[::step] if tower == "user" else at].to(device) for tower in tables}
        knowledge = {f"{tower}_knowledge": table[own[tower]] for tower, table in tables.items()}
        inputs = {name: tensor.to(device) for name, tensor in feed.inputs(at).items()}
        logits.append(model({**inputs, **knowledge}).cpu())
    return torch.cat(logits) if logits else torch.zeros(0)


@dataclass(slots=True)
class _Course:
    """A training under way: everything that it needs to go on from here."""

    model: CTRModel
    optimiser: torch.optim.Optimizer
    best: dict[str, Tensor] = field(default_factory=dict)
    epochs: list[Epoch] = field(default_factory=list)
    step: int = 0
    """Steps done in the current epoch; the sums below are over these."""
    loss: float = 0.0
    rows: int = 0
    clipped: int = 0

    def goes_on(self, settings: TrainSettings) -> bool:
        """Whether one more epoch may help."""
        if not self.epochs:
            return True
        best = min(self.epochs, key=lambda epoch: epoch.validation_loss)
        return len(self.epochs) < settings.epochs and len(self.epochs) - best.number < settings.patience

    def end_epoch(self, validation_loss: float) -> Epoch:
        """Note what the epoch gave; its weights are kept if they are the best so far."""
        if not math.isfinite(validation_loss):
            raise FloatingPointError("training diverged: lower the learning rate")
        if validation_loss < min((epoch.validation_loss for epoch in self.epochs), default=math.inf):
            self.best = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}
        ratio = self.clipped / self.step
        epoch = Epoch(len(self.epochs) + 1, self.loss / self.rows, validation_loss, ratio)
        self.epochs.append(epoch)
        self.step, self.loss, self.rows, self.clipped = 0, 0.0, 0, 0
        return epoch

    def save(self, path: Path) -> None:
        """Write all of it, the state of the random numbers included; atomic."""
        moments = self.optimiser.state_dict()["state"]
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"optimiser/{i}/{key}": value for i, state in moments.items() for key, value in state.items()}
        tensors["random/state"] = torch.get_rng_state()
        progress = {"step": self.step, "loss": self.loss, "rows": self.rows, "clipped": self.clipped}
        said = {"epochs": [epoch.to_json() for epoch in self.epochs], "progress": progress}
        draft = path.with_suffix(".draft")
        save_file({name: value.contiguous() for name, value in tensors.items()}, draft, {"said": json.dumps(said)})
        draft.replace(path)

    def load(self, path: Path) -> None:
        """Put everything back to where `save` was called."""
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimiser": {}, "random": {}}
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["said"])
            for key in file.keys():  # noqa: SIM118 - not a mapping
                group, name = key.split("/", 1)
                groups[group][name] = file.get_tensor(key)
        self.model.load_state_dict(groups["model"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in groups["optimiser"].items():
            number, name = key.split("/")
            state.setdefault(int(number), {})[name] = value
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.best, self.epochs = groups["best"], [Epoch(**values) for values in said["epochs"]]
        for name, value in said["progress"].items():
            setattr(self, name, value)
        torch.set_rng_state(groups["random"]["state"])


def fit(
    make: Callable[[], CTRModel],
    train: BatchFeed,
    validation: BatchFeed,
    settings: TrainSettings,
    *,
    folder: Path,
    on_epoch: Callable[[Epoch], None],
) -> Fitted:
    """Train a model made by `make` until validation loss stops falling.

    The state goes to `folder` after each epoch and every half minute, so an interrupt costs no more; a later call
    with the same arguments goes on from there and, on one thread, ends bit for bit like an unbroken one. The caller's
    random state is left alone. Under torchrun, ranks share each batch and average gradients; the first one writes.
    """
    ranks = Ranks.current()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = make().to(ranks.device)
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        course = _Course(model, optimiser)
        if (folder / STATE).is_file():
            course.load(folder / STATE)
            if not ranks.first:  # the saved random state is the first rank's
                torch.manual_seed((settings.seed * 1_000 + len(course.epochs)) * ranks.count + ranks.rank)
            for epoch in course.epochs:
                on_epoch(epoch)
        while course.goes_on(settings):
            _epoch(course, train, settings, ranks, folder / STATE)
            ranks.level(model)
            logits = predict_logits(model, validation)
            epoch = course.end_epoch(model.backbone.loss(logits, validation.samples.label).item())
            if ranks.first:
                course.save(folder / STATE)
                on_epoch(epoch)
    model.load_state_dict(course.best)
    return Fitted(model.eval().cpu(), tuple(course.epochs))


def _epoch(course: _Course, feed: BatchFeed, settings: TrainSettings, ranks: Ranks, state: Path) -> None:
    """The rest of one pass over the rows, in an order that depends on seed and epoch only."""
    model, optimiser = course.model.train(), course.optimiser
    number = len(course.epochs)
    seed = settings.seed * 1_000 + number + 1
    order = feed.shuffled(settings.batch, torch.Generator().manual_seed(seed))
    if not course.step:
        torch.manual_seed(seed * ranks.count + ranks.rank)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved_s = time.monotonic()
    for at in order[course.step :]:
        share = ranks.share(at, feed.samples.list_length)
        optimiser.zero_grad()
        loss_sum = 0.0
        if len(share):
            batch = feed.batch(share, settings.knowledge_dropout).to(ranks.device)
            loss = model.backbone.loss(model(batch.inputs, batch.encodings), batch.labels)
            loss.backward()
            loss_sum = loss.item() * len(share)
        loss_sum = ranks.average(parameters, loss_sum, len(share) / len(at))
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm, foreach=True)
        warm = min(1.0, (number * len(order) + course.step + 1) / max(settings.warmup_steps, 1))
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * warm * settings.decay**number
        optimiser.step()
        course.loss += loss_sum
        course.rows += len(at)
        course.clipped += int(norm > settings.clip_norm)
        course.step += 1
        if ranks.first and time.monotonic() - saved_s > SAVE_EVERY_S:
            course.save(state)
            saved_s = time.monotonic()
