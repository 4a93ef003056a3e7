"""Owns a simulated life with a budget: a log cut into days, and the knowledge that is bought on each evening.

One clock rules: the times of events, cut into days at midnight UTC. On the evening of each day `refresh.policy` tells
what is due of what was seen by then, and the budget buys the most valuable; texts are in use from the next morning. The
life begins with the log, without a text, so that the month finds what the same budget bought before. A user's text is
written from the events before that evening and knows no others.
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
from kar_offline.refresh.policy import Policy, Reason, State, due, most_valuable
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["NEVER", "Call", "Month", "SimulatedHistory", "live", "taste"]

DAY_S: Final = 86_400
TRAFFIC_DAYS: Final = 30
"""Days whose events count as an entity's traffic."""
VALIDATION_SHARE: Final = 0.1
"""Of the events before the month, the last ones, in whole days."""
NEVER: Final = np.iinfo(np.int64).max
"""The day on which a thing happens that does not."""
LIKED: Final = 8
DISLIKED: Final = 4
"""Titles that a template-made text names at most, the latest."""
GENRES: Final = 3
"""Genres that it names at most, of each kind."""


@dataclass(frozen=True)
class Month:
    """A log until the end of a month, split by time: what lies before the month trains, the month tests."""

    dataset: Dataset
    """Every event is a sample: nothing is held back for prompts."""
    first: int
    """The day with which the month begins, counted from that of the first event."""
    days: int
    event_day: NDArray[np.int64]
    """[E]"""
    item_day: NDArray[np.int64]
    """[I] day of each item's first event; `NEVER` for those without."""

    @staticmethod
    def of(dataset: Dataset, *, share: float, days: int) -> "Month":
        """The `days` beginning with the day in which the event lies that `share` of all events come before.

        Raises:
            InputError: `share` or `days` make no month.
            PreconditionError: users have no clock in common, or a split would be empty.
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
            raise PreconditionError(f"{dataset.name} has too few events before the month or in it: begin it elsewhere")
        item_day = np.full(len(dataset.items), NEVER)
        np.minimum.at(item_day, cut.event_item, event_day[kept])
        return Month(cut, first, days, event_day[kept], item_day)

    @property
    def end(self) -> int:
        """The first day after the month."""
        return self.first + self.days

    @cached_property
    def events_by_morning(self) -> NDArray[np.int64]:
        """[E] how many events its user had on each event's morning."""
        user, number = self.dataset.event_user, np.arange(len(self.event_day))
        begins = np.diff(user, prepend=-1).astype(np.bool_) | np.diff(self.event_day, prepend=-1).astype(np.bool_)
        return np.maximum.accumulate(np.where(begins, number, 0)) - self.dataset.offsets[user]


class Call(NamedTuple):
    """One text that is asked for."""

    day: int
    """On whose evening; it is in use on the days after."""
    kind: str
    row: int
    """Of the dataset."""
    cutoff: int
    """Users: how many of their first events it is written from."""
    reason: Reason


@dataclass(frozen=True, slots=True)
class SimulatedHistory:
    """What a budget bought, from the log's first evening to the month's last."""

    calls: tuple[Call, ...]
    """In the order of evenings."""
    waiting: NDArray[np.int64]
    """[evenings] how much was due and not bought."""

    def asked(self, items: int) -> NDArray[np.int64]:
        """[items] the evening on which each item was asked about; `NEVER` for the others."""
        day = np.full(items, NEVER)
        for call in self.calls:
            if call.kind == "item":
                day[call.row] = call.day
        return day

    @property
    def versions(self) -> list[Call]:
        """Calls about users: each makes a version of a user's text."""
        return [call for call in self.calls if call.kind == "user"]

    def version_at(self, month: Month) -> NDArray[np.int64]:
        """[E] the number in `versions` of the text about its user on each event's morning; -1: none."""
        of_user: dict[int, list[tuple[int, int]]] = {}
        for number, call in enumerate(self.versions):
            of_user.setdefault(call.row, []).append((call.day, number))
        found = np.full(len(month.event_day), -1)
        for user, written in of_user.items():
            own = slice(*month.dataset.offsets[user : user + 2])
            days, numbers = zip(*written, strict=True)
            found[own] = np.array([-1, *numbers])[np.searchsorted(days, month.event_day[own])]
        return found


def live(month: Month, kinds: Collection[str], budget: int | None, policy: Policy | None = None) -> SimulatedHistory:
    """Spend `budget` calls (None: any number) about entities of `kinds` ("item", "user") on every evening."""
    dataset, policy = month.dataset, policy or Policy()
    order = np.argsort(month.event_day, kind="stable")
    days = month.event_day[order]
    ids = {"item": [item.id for item in dataset.items], "user": [user.id for user in dataset.users]}
    rows_of = {kind: {id_: row for row, id_ in enumerate(of)} for kind, of in ids.items()}
    entity = {"item": dataset.event_item[order], "user": dataset.event_user[order]}
    asked = np.zeros(len(dataset.items), np.bool_)
    cutoff = np.zeros(len(dataset.users), np.int64)
    calls: list[Call] = []
    waiting = np.zeros(month.end, np.int64)
    for day in range(month.end):
        since, now = np.searchsorted(days, (day - TRAFFIC_DAYS, day), side="right")
        states: list[State] = []
        seen = {kind: np.bincount(of[:now], minlength=len(ids[kind])) for kind, of in entity.items()}
        traffic = {kind: np.bincount(of[since:now], minlength=len(ids[kind])) for kind, of in entity.items()}
        if "item" in kinds:  # nothing makes a written text about an item stale here
            rows = np.flatnonzero((seen["item"] > 0) & ~asked)
            states += [State("item", ids["item"][row], int(traffic["item"][row]), written=False) for row in rows]
        if "user" in kinds:
            states += [
                State(
                    "user",
                    ids["user"][row],
                    int(traffic["user"][row]),
                    written=bool(cutoff[row]),
                    events=int(seen["user"][row]),
                    cutoff=int(cutoff[row]),
                )
                for row in np.flatnonzero(seen["user"])
            ]
        bought, left = most_valuable(due(states, policy), budget)
        waiting[day] = len(left)
        for one in bought:
            row = rows_of[one.kind][one.id]
            if one.kind == "item":
                asked[row] = True
            else:
                cutoff[row] = seen["user"][row]
            calls.append(Call(day, one.kind, row, int(cutoff[row]) if one.kind == "user" else 0, one.reasons[0]))
    return SimulatedHistory(tuple(calls), waiting)


def taste(history: Sequence[tuple[Entity, float]]) -> str:
    """A template-made text about a user: genres and titles that they rated above and below their own mean.

    `history` holds the items and ratings that the text may know, oldest first; not empty.
    """
    mean = float(np.mean([rating for _, rating in history]))
    leaning: dict[str, float] = {}
    for item, rating in history:
        for genre in item.facts.get("genres", ()):
            leaning[genre] = leaning.get(genre, 0.0) + rating - mean
    ranked = sorted(leaning, key=lambda genre: (-leaning[genre], genre))
    above, below = (
        [str(item.facts.get("title", item.id)) for item, rating in history if (rating >= mean) == high]
        for high in (True, False)
    )
    said = (
        ("Likes the genres", [genre for genre in ranked if leaning[genre] > 0][:GENRES]),
        ("Enjoyed", above[-LIKED:]),
        ("Likes less the genres", [genre for genre in reversed(ranked) if leaning[genre] < 0][:GENRES]),
        ("Did not enjoy", below[-DISLIKED:]),
    )
    return " ".join(f"{what} {', '.join(names)}." for what, names in said if names)
