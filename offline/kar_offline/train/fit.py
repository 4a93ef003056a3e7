"""Owns the optimisation of one model: steps, schedule, clipping, early stopping, and resuming an interrupted run."""

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
from kar_offline.train.batches import Batches
from kar_offline.train.distributed import ProcessGroup
from kar_offline.train.predict import predict_logits
from kar_offline.train.settings import TrainSettings

__all__ = ["STATE", "Epoch", "FittedModel", "fit"]

STATE: Final = "state.safetensors"
PROGRESS: Final = "said"
"""Key of the progress in the metadata of `STATE`."""
SAVE_EVERY_S: Final = 30.0
"""Seconds between two saves of the state within an epoch."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """The figures of one epoch."""

    number: int
    """Counted from 1."""
    train_loss: float
    """Mean loss of the training rows."""
    validation_loss: float
    """Mean loss of the validation rows after the epoch."""
    clipped_ratio: float
    """Share of the steps whose gradients were clipped."""

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FittedModel:
    """A model in evaluation mode with the weights of its best epoch, and the figures of all epochs."""

    model: CTRModel
    epochs: tuple[Epoch, ...]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights by name, on the CPU."""
        return self.model.state_dict()

    @property
    def best(self) -> Epoch:
        """The epoch with the lowest validation loss, whose weights were kept."""
        return min(self.epochs, key=lambda epoch: epoch.validation_loss)


@dataclass(slots=True)
class _TrainingState:
    """Everything that an interrupted training needs to go on."""

    model: CTRModel
    optimiser: torch.optim.Optimizer
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the best epoch."""
    epochs: list[Epoch] = field(default_factory=list)
    step: int = 0
    """Steps done in the current epoch; the sums below are over these steps."""
    loss: float = 0.0
    rows: int = 0
    clipped: int = 0

    def goes_on(self, settings: TrainSettings) -> bool:
        """Whether to train for one more epoch."""
        if not self.epochs:
            return True
        best = min(self.epochs, key=lambda epoch: epoch.validation_loss)
        return len(self.epochs) < settings.epochs and len(self.epochs) - best.number < settings.patience

    def end_epoch(self, validation_loss: float) -> Epoch:
        """Record an epoch, and keep its weights if its validation loss is the lowest."""
        if not math.isfinite(validation_loss):
            raise FloatingPointError("training diverged: lower the learning rate")
        if validation_loss < min((epoch.validation_loss for epoch in self.epochs), default=math.inf):
            self.best = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}
        epoch = Epoch(len(self.epochs) + 1, self.loss / self.rows, validation_loss, self.clipped / self.step)
        self.epochs.append(epoch)
        self.step, self.loss, self.rows, self.clipped = 0, 0.0, 0, 0
        return epoch

    def save(self, path: Path) -> None:
        """Write the whole state, the random number generator's included; the file is replaced in one step."""
        moments = self.optimiser.state_dict()["state"]
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"optimiser/{i}/{key}": value for i, state in moments.items() for key, value in state.items()}
        tensors["random/state"] = torch.get_rng_state()
        sums = {"step": self.step, "loss": self.loss, "rows": self.rows, "clipped": self.clipped}
        progress = {"epochs": [epoch.to_json() for epoch in self.epochs], "progress": sums}
        draft = path.with_suffix(".draft")
        metadata = {PROGRESS: json.dumps(progress)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, draft, metadata)
        draft.replace(path)

    def load(self, path: Path) -> None:
        """Restore the state that `save` wrote."""
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimiser": {}, "random": {}}
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()[PROGRESS])
            for key in file.keys():  # noqa: SIM118 - not a mapping
                group, name = key.split("/", 1)
                groups[group][name] = file.get_tensor(key)
        self.model.load_state_dict(groups["model"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in groups["optimiser"].items():
            parameter, name = key.split("/")
            moments.setdefault(int(parameter), {})[name] = value
        self.optimiser.load_state_dict({"state": moments, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.best, self.epochs = groups["best"], [Epoch(**values) for values in progress["epochs"]]
        for name, value in progress["progress"].items():
            setattr(self, name, value)
        torch.set_rng_state(groups["random"]["state"])


def fit(
    make: Callable[[], CTRModel],
    train: Batches,
    validation: Batches,
    settings: TrainSettings,
    *,
    folder: Path,
    on_epoch: Callable[[Epoch], None],
) -> FittedModel:
    """Train a model until its validation loss stops falling.

    The state is saved after each epoch and every half minute. A later call with the same arguments goes on from there;
    with one thread it ends with the same bits as an uninterrupted call. Torch's global random state is left unchanged.
    Under torchrun, the processes share each batch and average gradients; the first process writes.

    Args:
        make: Makes the model with fresh weights.
        train: Training rows.
        validation: Validation rows.
        settings: Seed and hyperparameters.
        folder: Folder of the state.
        on_epoch: Called after each epoch, and at the start with each epoch of an interrupted call.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    group = ProcessGroup.current()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = make().to(group.device)
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        state = _TrainingState(model, optimiser)
        if (folder / STATE).is_file():
            state.load(folder / STATE)
            if not group.is_first:  # the saved random state belongs to the first process
                torch.manual_seed((settings.seed * 1_000 + len(state.epochs)) * group.size + group.rank)
            for epoch in state.epochs:
                on_epoch(epoch)
        while state.goes_on(settings):
            _train_epoch(state, train, settings, group, folder / STATE)
            group.average_statistics(model)
            logits = predict_logits(model, validation)
            epoch = state.end_epoch(model.backbone.loss(logits, validation.samples.label).item())
            if group.is_first:
                state.save(folder / STATE)
                on_epoch(epoch)
    model.load_state_dict(state.best)
    return FittedModel(model.eval().cpu(), tuple(state.epochs))


def _train_epoch(
    state: _TrainingState, batches: Batches, settings: TrainSettings, group: ProcessGroup, state_file: Path
) -> None:
    """Do the remaining steps of an epoch; the order of the rows depends on seed and epoch only."""
    model, optimiser = state.model.train(), state.optimiser
    epoch = len(state.epochs)
    seed = settings.seed * 1_000 + epoch + 1
    order = batches.in_random_order(settings.batch, torch.Generator().manual_seed(seed))
    if not state.step:
        torch.manual_seed(seed * group.size + group.rank)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved_s = time.monotonic()
    for rows in order[state.step :]:
        share = group.share(rows, batches.samples.list_length)
        optimiser.zero_grad()
        loss_sum = 0.0
        if len(share):
            batch = batches.batch(share, settings.knowledge_dropout).to(group.device)
            loss = model.backbone.loss(model(batch.inputs, batch.encodings), batch.labels)
            loss.backward()
            loss_sum = loss.item() * len(share)
        loss_sum = group.average_gradients(parameters, loss_sum, len(share) / len(rows))
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm, foreach=True)
        _set_learning_rate(optimiser, settings, epoch, epoch * len(order) + state.step)
        optimiser.step()
        state.loss += loss_sum
        state.rows += len(rows)
        state.clipped += int(norm > settings.clip_norm)
        state.step += 1
        if group.is_first and time.monotonic() - saved_s > SAVE_EVERY_S:
            state.save(state_file)
            saved_s = time.monotonic()


def _set_learning_rate(optimiser: torch.optim.Optimizer, settings: TrainSettings, epoch: int, step: int) -> None:
    """Set the learning rate of a step; `epoch` and `step` count from 0 over the whole training."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    for group in optimiser.param_groups:
        group["lr"] = settings.learning_rate * warmup * settings.decay**epoch
