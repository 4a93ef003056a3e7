"""Owns the reports of a generation: the contents of the folder that it wrote, and its run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from kar_offline.generate.runner import Tally

__all__ = ["FolderReport", "RegenerationReport", "RunReport"]


@dataclass(frozen=True, slots=True)
class FolderReport:
    """The contents of a folder of records."""

    source: str
    """The pack, or the model and its parameters."""
    records: int
    """Number of texts, including refused texts and texts about clusters."""
    kinds: Mapping[str, int]
    """Number of these texts by kind of entity."""
    clusters: int
    """Texts about clusters that are in use."""
    lent: int
    """Entities whose vector will be imputed from named neighbours."""
    quarantined: int
    """Texts that a gate refused."""
    unanswered: int
    """Questions without an answer."""
    gates: Mapping[str, int]
    """Refused texts by gate; several gates can refuse one text."""

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Self:
        """The part of a stage's report that is about the folder."""
        return cls(**{field.name: report[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class RunReport:
    """What one run sent and received."""

    calls: int
    """Questions that were sent."""
    requests: int
    """HTTP requests, including refused and failed ones."""
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    """None: the price is not known."""
    stopped: str
    """Why the run ended before all questions were asked; empty: all were asked."""

    @classmethod
    def of(cls, tally: Tally) -> Self:
        """The report of a run's counts."""
        return cls(**{field.name: getattr(tally, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class RegenerationReport:
    """The result of asking again about chosen entities."""

    written: int
    """Records that changed."""
    refused: int
    """Texts that a gate refused."""
    unanswered: int
    """Questions without an answer."""
    gates: Mapping[str, int]
    """Refused texts by gate."""
