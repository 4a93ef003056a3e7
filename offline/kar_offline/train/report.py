"""Owns the report of a training: the figures of every run."""

from dataclasses import dataclass

__all__ = ["RunReport", "TrainingReport"]


@dataclass(frozen=True, slots=True)
class RunReport:
    """The figures of one run."""

    validation_loss: float
    """Mean loss of the validation rows at the best epoch."""
    best_epoch: int
    """Number of the epoch whose weights were kept, from 1."""
    epochs: int
    """Number of epochs trained."""
    samples: dict[str, int]
    """Number of rows by split, `train` and `validation`."""


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The figures of all runs of a training."""

    runs: dict[str, RunReport]
    """By the run's name, backbone and arm, such as "dcnv2_knowledge"."""
