"""Owns the report of the stage `dataset`: the sizes of a dataset and of its splits."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import SPLITS

__all__ = ["DatasetReport", "SplitSize"]


@dataclass(frozen=True, slots=True)
class SplitSize:
    """The size of one split."""

    users: int
    """Users with samples in the split."""
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """The sizes of a dataset and its origin."""

    source: str
    skipped_sources: tuple[str, ...] | None = None
    """Sources that failed before, each with its error; None if there is only one source."""
    name: str
    split: str
    """How the events were split, in words."""
    users: int
    items: int
    events: int
    samples: int
    positive_ratio: float
    """Share of positive samples; 0 without samples."""
    splits: dict[str, SplitSize]
    """By name: train, validation, test."""

    @staticmethod
    def of(dataset: Dataset, source: str, skipped_sources: tuple[str, ...] | None = None) -> "DatasetReport":
        """Count the users, items, events and samples of a dataset."""
        samples = dataset.sample_events
        splits = {name: dataset.samples(split) for split, name in enumerate(SPLITS)}
        return DatasetReport(
            source=source,
            skipped_sources=skipped_sources,
            name=dataset.name,
            split=dataset.split,
            users=len(dataset.users),
            items=len(dataset.items),
            events=len(dataset.event_item),
            samples=len(samples),
            positive_ratio=float(dataset.labels[samples].mean()) if len(samples) else 0.0,
            splits={
                name: SplitSize(len(np.unique(dataset.event_user[events])), len(events))
                for name, events in splits.items()
            },
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; `skipped_sources` is left out if there is only one source."""
        values = asdict(self)
        return (
            values if self.skipped_sources is not None else {k: v for k, v in values.items() if k != "skipped_sources"}
        )
