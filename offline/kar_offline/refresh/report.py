"""Owns the report of a refresh."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kar_offline.refresh.ingest import Arrivals
from kar_offline.refresh.plan import Plan
from kar_offline.refresh.policy import Reason, RefreshCandidate
from kar_offline.refresh.rewrite import TextCounts
from kar_sidecar.entities import EntityKind

__all__ = ["ArrivalCounts", "RefreshReport", "WaitingReport"]

SHOWN_CANDIDATES: Final = 20
"""Waiting candidates that a report names."""

KindCounts = Mapping[EntityKind, int]


@dataclass(frozen=True, slots=True)
class ArrivalCounts:
    """Numbers of new users, items and events."""

    users: int
    items: int
    events: int


@dataclass(frozen=True, slots=True)
class WaitingReport:
    """Candidates whose text is not written in this refresh."""

    counts: KindCounts
    value: float
    """Sum of their values."""
    most_valuable: Sequence[RefreshCandidate]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        named = [
            {"kind": candidate.kind, "id": candidate.id, "reasons": list(candidate.reasons), "value": candidate.value}
            for candidate in self.most_valuable
        ]
        counts = {kind.value: count for kind, count in self.counts.items()}
        return {**counts, "value": self.value, "most_valuable": named}


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """The result of a refresh: new and due entities, calls, cost, and records written."""

    arrived: ArrivalCounts
    due: Mapping[Reason, KindCounts]
    """Candidates by their first reason."""
    chosen: KindCounts
    waiting: WaitingReport
    calls: int
    """Questions that were sent; in a dry run, questions that a refresh would send."""
    cost_usd: float | None
    """Cost of these questions; None: the price is unknown."""
    release_id: str
    dry_run: bool
    texts: TextCounts | None = None
    """None in a dry run."""
    encoded: int | None = None
    """Texts that were encoded; None in a dry run."""
    written: Mapping[str, int] | None = None
    """Records written into the store, by part; None in a dry run."""
    seconds: float = 0.0

    @staticmethod
    def planned(arrivals: Arrivals, plan: Plan, release_id: str, *, dry_run: bool) -> "RefreshReport":
        """The report after the phases `ingest` and `plan`."""
        reasons = Counter((candidate.kind, candidate.reasons[0]) for candidate in plan.due)
        return RefreshReport(
            arrived=ArrivalCounts(arrivals.users, arrivals.items, arrivals.events),
            due={reason: {kind: reasons[kind, reason] for kind in EntityKind} for reason in Reason},
            chosen=_by_kind(plan.chosen),
            waiting=WaitingReport(
                _by_kind(plan.waiting),
                sum(candidate.value for candidate in plan.waiting),
                plan.waiting[:SHOWN_CANDIDATES],
            ),
            calls=plan.calls,
            cost_usd=plan.cost_usd,
            release_id=release_id,
            dry_run=dry_run,
        )

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object; a dry run has no `texts`, `encoded` and `written`."""
        report: dict[str, Any] = {
            "arrived": asdict(self.arrived),
            "due": {reason.value: dict(counts) for reason, counts in self.due.items()},
            "chosen": dict(self.chosen),
            "waiting": self.waiting.as_json(),
            "calls": self.calls,
            "cost_usd": self.cost_usd,
            "release_id": self.release_id,
            "dry_run": self.dry_run,
        }
        if self.texts is not None:
            texts = asdict(self.texts) | {"gates": dict(self.texts.gates or {})}
            report |= {"texts": texts, "encoded": self.encoded, "written": self.written}
        return report | {"seconds": self.seconds}


def _by_kind(candidates: Iterable[RefreshCandidate]) -> dict[EntityKind, int]:
    counts = Counter(candidate.kind for candidate in candidates)
    return {kind: counts[kind] for kind in EntityKind}
