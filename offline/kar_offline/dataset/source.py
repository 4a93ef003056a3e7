"""Owns the Protocol of data sources, such as MovieLens or a log of the user's own, which the stage `dataset` reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kar_offline.dataset.dataset import Dataset

__all__ = ["DatasetSource", "SourcedDataset"]


@dataclass(frozen=True, slots=True)
class SourcedDataset:
    """A dataset with its origin."""

    dataset: Dataset
    """Checked, but not yet split as the options of the stage say."""
    source: str
    """Name of the source in reports."""
    skipped_sources: tuple[str, ...] | None = None
    """Sources that failed before, each with its error; None if there is only one source."""


class DatasetSource(Protocol):
    """A source of data. `kar dataset` builds the dataset of one source."""

    @property
    def params(self) -> Mapping[str, Any]:
        """Options and content hashes that the dataset depends on, as JSON values; if one changes, it is built again."""
        ...

    def read(self, history_length: int) -> SourcedDataset:
        """Get, check and convert the data.

        Args:
            history_length: Maximal number of events in the history of a sample.

        Raises:
            KarError: the data are missing, corrupt or wrong; the text says what to do.
        """
        ...
