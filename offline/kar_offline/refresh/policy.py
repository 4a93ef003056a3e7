"""Owns the refresh policy: the reasons for which knowledge is due, its staleness, and the order of rewriting.

value = traffic x staleness

Staleness estimates, from 0 to 1, the share of useful knowledge about an entity that its text lacks. Traffic is the
number of events of the entity in a window of time. The functions here are pure: equal inputs give equal candidates.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from kar_sidecar.entities import EntityKind
from kar_sidecar.errors import InputError

__all__ = ["KnowledgeState", "Policy", "Reason", "RefreshCandidate", "refresh_candidates", "within_budget"]

OLDER_TEMPLATE_STALENESS: Final = 0.25
"""A text from an older prompt template is still true, but a newer template gives a better text."""


class Reason(StrEnum):
    """Why knowledge is due."""

    NEW = "new"
    """The entity has no text."""
    GROWN = "grown"
    """The user has had many events since the text was written."""
    EXPIRED = "expired"
    """The text is past its expiry time."""
    SEASON = "season"
    """The text was written for other seasons than those of today."""
    TEMPLATE = "template"
    """The text was written from an older version of the prompt template."""


@dataclass(frozen=True, slots=True)
class KnowledgeState:
    """The state of one entity's knowledge at some time."""

    kind: EntityKind
    id: str
    traffic: float
    """Number of events in the window of time, not negative."""
    has_text: bool = True
    """Whether a text is in use: the entity's own text, or texts of neighbours."""
    events: int = 0
    """Users: number of events until now."""
    cutoff: int = 0
    """Users: number of events that the text was written from."""
    expired: bool = False
    season_changed: bool = False
    template_changed: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """Conditions for knowledge to be due."""

    grown_by: int = 10
    """Number of a user's events since the text was written."""
    reasons: frozenset[Reason] = frozenset(Reason)
    """Only these reasons make knowledge due."""
    kinds: frozenset[EntityKind] | None = frozenset(EntityKind)
    """Only these kinds of entities can be due; None: the kinds whose vectors the release's model reads."""

    def __post_init__(self) -> None:
        """Check the conditions.

        Raises:
            InputError: `grown_by` is less than 1, or no reason or kind counts.
        """
        if self.grown_by < 1 or not self.reasons or self.kinds == frozenset():
            raise InputError("a refresh needs --grown-by of at least 1, one reason and one kind: give them")


class RefreshCandidate(NamedTuple):
    """An entity whose knowledge is due."""

    kind: EntityKind
    id: str
    reasons: tuple[Reason, ...]
    """The reason with the largest staleness first."""
    traffic: float
    staleness: float

    @property
    def value(self) -> float:
        """Value of a new text: traffic times staleness."""
        return self.traffic * self.staleness


def refresh_candidates(states: Iterable[KnowledgeState], policy: Policy) -> list[RefreshCandidate]:
    """Entities whose knowledge is due, the most valuable first; equal values are ordered by kind and id."""
    candidates = []
    for state in states:
        if policy.kinds is not None and state.kind not in policy.kinds:
            continue
        staleness = {reason: share for reason, share in _staleness(state, policy).items() if reason in policy.reasons}
        if staleness:
            reasons = sorted(staleness, key=lambda reason: -staleness[reason])
            candidates.append(
                RefreshCandidate(state.kind, state.id, tuple(reasons), state.traffic, staleness[reasons[0]])
            )
    return sorted(candidates, key=lambda candidate: (-candidate.value, candidate.kind, candidate.id))


def _staleness(state: KnowledgeState, policy: Policy) -> Mapping[Reason, float]:
    """The staleness for each reason for which the knowledge is due."""
    if not state.has_text:
        return {Reason.NEW: 1.0}
    staleness = {}
    if state.expired:
        staleness[Reason.EXPIRED] = 1.0
    if state.season_changed:
        staleness[Reason.SEASON] = 1.0
    if (new_events := state.events - state.cutoff) >= policy.grown_by:
        staleness[Reason.GROWN] = new_events / state.events
    if state.template_changed:
        staleness[Reason.TEMPLATE] = OLDER_TEMPLATE_STALENESS
    return staleness


def within_budget(
    candidates: Sequence[RefreshCandidate], calls: int | None
) -> tuple[list[RefreshCandidate], list[RefreshCandidate]]:
    """Split candidates, the most valuable first, into the candidates that a budget covers and the candidates that wait.

    Args:
        candidates: From `refresh_candidates`.
        calls: Maximal number of calls, one per candidate; None: no limit.
    """
    count = len(candidates) if calls is None else max(0, calls)
    return list(candidates[:count]), list(candidates[count:])
