"""Owns which knowledge is worth writing anew: why a text is due, how stale it is, and what a budget buys first.

value = traffic x staleness

Staleness is the share of what is worth knowing about an entity that its text does not tell, 0 to 1; traffic is how
often the entity is asked about, here the events of a window. A pure function of both, so a run can be repeated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from kar_sidecar.errors import InputError

__all__ = ["Policy", "Reason", "RefreshCandidate", "State", "due", "most_valuable"]

OLDER_TEMPLATE: Final = 0.25
"""Staleness of a text that an older prompt brought: true, but not the best to be had."""


class Reason(StrEnum):
    """Why knowledge is written anew."""

    NEW = "new"
    """There is no text."""
    GROWN = "grown"
    """The user did so much that the text does not know of."""
    EXPIRED = "expired"
    """Its time is over."""
    SEASON = "season"
    """It was written for a season or event that is over, or before one that has begun."""
    TEMPLATE = "template"
    """It comes from an older version of the prompt."""


@dataclass(frozen=True, slots=True)
class State:
    """What is known of one entity and its text at some time."""

    kind: str
    """"item" or "user"."""
    id: str
    traffic: float
    """How often it is asked about; not negative."""
    written: bool = True
    """Whether there is a text of its own in use."""
    events: int = 0
    """Users: events until now."""
    cutoff: int = 0
    """Users: events that the text was written from."""
    expired: bool = False
    season_changed: bool = False
    template_changed: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """What makes knowledge due.

    `grown_by` is the number of a user's events since its text that make it due; `reasons` and `kinds` of entities are
    those that count.
    """

    grown_by: int = 10
    reasons: frozenset[Reason] = frozenset(Reason)
    kinds: frozenset[str] = frozenset({"item", "user"})

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: `grown_by` is less than 1, or no reason or kind counts.
        """
        if self.grown_by < 1 or not self.reasons or not self.kinds:
            raise InputError("a policy needs at least 1 event of growth, one reason and one kind: give them")


class RefreshCandidate(NamedTuple):
    """An entity whose knowledge is due, with the strongest reason first."""

    kind: str
    id: str
    reasons: tuple[Reason, ...]
    traffic: float
    staleness: float

    @property
    def value(self) -> float:
        """What a text is worth: requests that it makes better."""
        return self.traffic * self.staleness


def due(states: Iterable[State], policy: Policy) -> list[RefreshCandidate]:
    """What is due, most valuable first; ties by kind and id, so that the order is always the same."""
    found = []
    for state in states:
        if state.kind not in policy.kinds:
            continue
        stale = {reason: share for reason, share in _staleness(state, policy).items() if reason in policy.reasons}
        if stale:
            reasons = sorted(stale, key=lambda reason: -stale[reason])
            found.append(RefreshCandidate(state.kind, state.id, tuple(reasons), state.traffic, stale[reasons[0]]))
    return sorted(found, key=lambda one: (-one.value, one.kind, one.id))


def _staleness(state: State, policy: Policy) -> dict[Reason, float]:
    if not state.written:
        return {Reason.NEW: 1.0}
    stale = {}
    if state.expired:
        stale[Reason.EXPIRED] = 1.0
    if state.season_changed:
        stale[Reason.SEASON] = 1.0
    if (unknown := state.events - state.cutoff) >= policy.grown_by:
        stale[Reason.GROWN] = unknown / state.events
    if state.template_changed:
        stale[Reason.TEMPLATE] = OLDER_TEMPLATE
    return stale


def most_valuable(
    found: Sequence[RefreshCandidate], calls: int | None
) -> tuple[list[RefreshCandidate], list[RefreshCandidate]]:
    """What a budget of `calls` (None: any number) buys of what `due` found, and what has to wait."""
    count = len(found) if calls is None else max(0, calls)
    return list(found[:count]), list(found[count:])
