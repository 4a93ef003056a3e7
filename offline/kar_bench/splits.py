"""Owns how benchmarks split a dataset into training, validation and test."""

from dataclasses import dataclass
from typing import Literal

from kar_offline.dataset.dataset import Dataset

__all__ = ["SplitProtocol", "split_dataset"]


@dataclass(frozen=True, slots=True)
class SplitProtocol:
    """Users are dealt into folds and each fold is tested once, or one split by time tests the latest events."""

    by: Literal["user", "time"] = "user"
    folds: int = 5
    share: float = 1.0
    """Of the training users that are used, in a split by user."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        prefix = f"user{self.folds}" if self.by == "user" else "time"
        return prefix if self.share == 1 else f"{prefix}_share{self.share:g}"


def split_dataset(dataset: Dataset, protocol: SplitProtocol, fold: int) -> Dataset:
    """The dataset with the split of one fold."""
    if protocol.by == "time":
        return dataset.split_by_time()
    dataset = dataset.split_by_user(fold=fold, folds=protocol.folds)
    return dataset if protocol.share == 1 else dataset.with_less_training(protocol.share)
