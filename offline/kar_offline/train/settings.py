"""Owns the settings of a training run: batches, optimiser, early stopping and the sizes of the adaptor."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["TrainSettings"]


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Settings of a training run, the same for every backbone and arm."""

    seed: int = 0
    """Seed of initial weights, batches, dropout, shuffled texts and cross-fitting."""
    epochs: int = 20
    """Maximal number of epochs."""
    patience: int = 2
    """Epochs without a lower validation loss after which training stops."""
    batch: int = 512
    """Rows per step."""
    learning_rate: float = 1e-3
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay: float = 1.0
    """Factor that multiplies the learning rate after each epoch."""
    weight_decay: float = 1e-2
    """Decoupled weight decay (AdamW): a step shrinks weights by this times the learning rate."""
    clip_norm: float = 0.5
    """Largest norm of all gradients together; `metrics.json` has the share of steps that were clipped."""
    knowledge_dropout: float = 0.1
    """Probability that an entity's knowledge is dropped in a batch, and that all knowledge of a request is dropped."""
    shared_experts: int = 2
    """Experts of the adaptor that users and items share."""
    dedicated_experts: int = 5
    """Experts of the adaptor for each tower alone."""
    expert_hidden: int = 128
    """Units of an expert's first layer."""
    knowledge_width: int = 32
    """Components of a knowledge vector, the adaptor's output."""

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)
