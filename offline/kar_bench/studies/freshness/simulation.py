"""Owns the simulation of a daily budget of calls: a log cut into days, and the texts that are bought on each evening.

There is one clock, the times of events, cut into days at midnight UTC. On each evening `refresh.policy` says which of
the entities seen by then are due, and the budget buys the most valuable texts, which are in use from the next morning.
The simulation begins with the log and without any text, so that the month starts with the texts that the same budget
bought before. A user's text is written from the events before its evening and knows no later ones.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.splits import TEST, TRAIN, VALIDATION
from kar_offline.refresh.policy import KnowledgeState, Policy, Reason, refresh_candidates, within_budget
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["DAY_S", "NEVER", "Call", "Month", "SimulatedHistory", "preference_text", "simulate"]

DAY_S: Final = 86_400
TRAFFIC_DAYS: Final = 30
"""Days whose events count as an entity's traffic."""
VALIDATION_SHARE: Final = 0.1
"""Share of the events before the month that choose the epoch: the last ones, in whole days."""
NEVER: Final = np.iinfo(np.int64).max
"""In place of a day, for what does not happen."""
LIKED: Final = 8
DISLIKED: Final = 4
"""The most titles that a template-made text names, the latest ones."""
GENRES: Final = 3
"""The most genres that a template-made text names as liked, and as not liked."""


@dataclass(frozen=True)
class Month:
    """A log until the end of a month, split by time: events before the month train, events of the month test."""

    dataset: Dataset
    """Every event is a sample; none is reserved for prompts."""
    first: int
    """The day with which the month begins, counted from the day of the first event."""
    days: int
    event_day: NDArray[np.int64]
    """[E] day of each event."""
    item_day: NDArray[np.int64]
    """[I] day of each item's first event; `NEVER` for items without events."""

    @staticmethod
    def of(dataset: Dataset, *, share: float, days: int) -> "Month":
        """The month of `days` days that begins with the day of the first event after a share of all events.

        Raises:
            InputError: `share` is not between 0 and 1, or `days` is not positive.
            PreconditionError: users have no common clock, or a split would be empty.
        """
        if not (0 < share < 1 and days > 0):
            raise InputError("a month begins after a share of the events between 0 and 1, and has a day or more")
        if not dataset.shared_clock:
            raise PreconditionError(f"{dataset.name} has no times, only each user's order of events: no month in it")
        times = np.sort(dataset.event_time)
        event_day = (dataset.event_time - (times[0] - times[0] % DAY_S)) // DAY_S
        sorted_days = np.sort(event_day)
        first = int(sorted_days[int(share * len(times))])
        before = np.searchsorted(sorted_days, first)
        validation = sorted_days[min(int((1 - VALIDATION_SHARE) * before), len(times) - 1)]
        split = np.select([event_day >= first, event_day >= validation], [TEST, VALIDATION], TRAIN)
        kept = event_day < first + days
        counts = np.bincount(dataset.event_user[kept], minlength=len(dataset.users))
        cut = replace(
            dataset,
            offsets=np.concatenate(([0], np.cumsum(counts))),
            cutoff=np.zeros_like(dataset.cutoff),
            event_item=dataset.event_item[kept],
            event_rating=dataset.event_rating[kept],
            event_time=dataset.event_time[kept],
            event_split=split[kept].astype(np.uint8),
            split=f"time, {days} days from {share:.0%} of the events for test, the last "
            f"{VALIDATION_SHARE:.0%} before for validation",
        )
        if min(len(cut.samples(part)) for part in (TRAIN, VALIDATION, TEST)) == 0:
            raise PreconditionError(
                f"{dataset.name} has too few events before the month or in it: choose another month"
            )
        item_day = np.full(len(dataset.items), NEVER)
        np.minimum.at(item_day, cut.event_item, event_day[kept])
        return Month(cut, first, days, event_day[kept], item_day)

    @property
    def end(self) -> int:
        """The first day after the month."""
        return self.first + self.days

    @cached_property
    def events_by_morning(self) -> NDArray[np.int64]:
        """[E] number of events that the event's user had by the morning of its day."""
        user, number = self.dataset.event_user, np.arange(len(self.event_day))
        day_begins = np.diff(user, prepend=-1).astype(np.bool_) | np.diff(self.event_day, prepend=-1).astype(np.bool_)
        return np.maximum.accumulate(np.where(day_begins, number, 0)) - self.dataset.offsets[user]


class Call(NamedTuple):
    """One text that a language model is asked for."""

    day: int
    """The evening of the call; the text is in use on the days after."""
    kind: str
    row: int
    """Row of the entity in the dataset."""
    cutoff: int
    """Users: number of their first events that the text is written from."""
    reason: Reason

    @property
    def version(self) -> str:
        """Users: the text's name among all versions, from the user's row and the cut-off."""
        return f"{self.row}/{self.cutoff}"


@dataclass(frozen=True, slots=True)
class SimulatedHistory:
    """The calls that a budget bought, from the first evening of the log to the last one of the month."""

    calls: tuple[Call, ...]
    """In the order of evenings."""
    waiting: NDArray[np.int64]
    """[evenings] number of entities that were due and not bought."""

    def asked_on(self, items: int) -> NDArray[np.int64]:
        """[items] the evening on which each item was asked about; `NEVER` for items that were not."""
        day = np.full(items, NEVER)
        for call in self.calls:
            if call.kind == "item":
                day[call.row] = call.day
        return day

    @property
    def versions(self) -> list[Call]:
        """Calls about users, each of which makes a version of a user's text."""
        return [call for call in self.calls if call.kind == "user"]

    def version_at(self, month: Month) -> NDArray[np.int64]:
        """[E] the number, in `versions`, of the user's text on the morning of each event; -1: no text."""
        by_user: dict[int, list[tuple[int, int]]] = {}
        for number, call in enumerate(self.versions):
            by_user.setdefault(call.row, []).append((call.day, number))
        version = np.full(len(month.event_day), -1)
        for user, calls in by_user.items():
            events = slice(*month.dataset.offsets[user : user + 2])
            days, numbers = zip(*calls, strict=True)
            version[events] = np.array([-1, *numbers])[np.searchsorted(days, month.event_day[events])]
        return version


def simulate(
    month: Month, kinds: Collection[str], budget: int | None, policy: Policy | None = None
) -> SimulatedHistory:
    """Spend a budget of calls on every evening.

    Args:
        month: The log.
        kinds: Kinds of entities that may be asked about, "item" and "user".
        budget: Calls an evening; None: as many as are due.
        policy: What makes a text due.
    """
    dataset, policy = month.dataset, policy or Policy()
    order = np.argsort(month.event_day, kind="stable")
    days = month.event_day[order]
    ids = {"item": [item.id for item in dataset.items], "user": [user.id for user in dataset.users]}
    row_by_id = {kind: {id_: row for row, id_ in enumerate(ids_)} for kind, ids_ in ids.items()}
    event_entity = {"item": dataset.event_item[order], "user": dataset.event_user[order]}
    item_written = np.zeros(len(dataset.items), np.bool_)
    user_cutoff = np.zeros(len(dataset.users), np.int64)
    calls: list[Call] = []
    waiting = np.zeros(month.end, np.int64)
    for day in range(month.end):
        window, now = np.searchsorted(days, (day - TRAFFIC_DAYS, day), side="right")
        events = {kind: np.bincount(rows[:now], minlength=len(ids[kind])) for kind, rows in event_entity.items()}
        traffic = {kind: np.bincount(rows[window:now], minlength=len(ids[kind])) for kind, rows in event_entity.items()}
        states: list[KnowledgeState] = []
        if "item" in kinds:  # a written text about an item never becomes stale here
            unwritten = np.flatnonzero((events["item"] > 0) & ~item_written)
            states += [
                KnowledgeState(ITEM, ids["item"][row], int(traffic["item"][row]), has_text=False) for row in unwritten
            ]
        if "user" in kinds:
            states += [
                KnowledgeState(
                    USER,
                    ids["user"][row],
                    int(traffic["user"][row]),
                    has_text=bool(user_cutoff[row]),
                    events=int(events["user"][row]),
                    cutoff=int(user_cutoff[row]),
                )
                for row in np.flatnonzero(events["user"])
            ]
        bought, left = within_budget(refresh_candidates(states, policy), budget)
        waiting[day] = len(left)
        for candidate in bought:
            row = row_by_id[candidate.kind][candidate.id]
            if candidate.kind == "item":
                item_written[row] = True
            else:
                user_cutoff[row] = events["user"][row]
            cutoff = int(user_cutoff[row]) if candidate.kind == "user" else 0
            calls.append(Call(day, candidate.kind, row, cutoff, candidate.reasons[0]))
    return SimulatedHistory(tuple(calls), waiting)


def preference_text(history: Sequence[tuple[Entity, float]]) -> str:
    """A template-made text about a user: genres and titles rated above and below the user's mean.

    `history` holds the items and ratings that the text may know, oldest first, at least one.
    """
    mean = float(np.mean([rating for _, rating in history]))
    preference: dict[str, float] = {}
    for item, rating in history:
        for genre in item.facts.get("genres", ()):
            preference[genre] = preference.get(genre, 0.0) + rating - mean
    ranked = sorted(preference, key=lambda genre: (-preference[genre], genre))
    above, below = (
        [str(item.facts.get("title", item.id)) for item, rating in history if (rating >= mean) == high]
        for high in (True, False)
    )
    sentences = (
        ("Likes the genres", [genre for genre in ranked if preference[genre] > 0][:GENRES]),
        ("Enjoyed", above[-LIKED:]),
        ("Likes less the genres", [genre for genre in reversed(ranked) if preference[genre] < 0][:GENRES]),
        ("Did not enjoy", below[-DISLIKED:]),
    )
    return " ".join(f"{opening} {', '.join(names)}." for opening, names in sentences if names)
