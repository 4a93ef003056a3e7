"""Owns the phase `ingest` of a refresh: it checks files of new entities and events and adds them to the dataset.

One JSON object per line: a new entity, or an event. A user who has events only needs no line of their own.
{"entity": "item", "id": "i9", "title": "Salt and Lanterns", "features": {"year": 2026}, "facts": {"genres": ["Drama"]}}
{"user": "u1", "item": "i9", "rating": 4.0, "time": 1764230400}
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from kar_offline.dataset.columns import HIGHEST_RATING, LATEST_S, TITLE, UNSTORABLE
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.jsonl import each_line
from kar_sidecar.entities import ITEM, USER, EntityKind
from kar_sidecar.errors import InputError
from kar_sidecar.features import FeatureLayout
from kar_sidecar.store import EntityKey

__all__ = ["Arrivals", "read_arrivals"]

CLOCK_TOLERANCE: Final = timedelta(days=1)
"""Events may be this far in the future, since clocks differ."""


def _storable(value: str) -> str:
    if UNSTORABLE.search(value):
        raise ValueError("holds a line break or NUL")
    return value


Id = Annotated[str, Field(min_length=1), AfterValidator(_storable)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _NewEntity(_Line):
    entity: EntityKind
    id: Id
    title: str = ""
    """The fact `title`, which may be given in `facts` instead."""
    features: dict[str, Any] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_title(self) -> "_NewEntity":
        if self.title and TITLE in self.facts:
            raise ValueError("has its title twice: leave out one")
        return self

    @property
    def as_entity(self) -> Entity:
        return Entity(self.id, self.features, ({TITLE: self.title} if self.title else {}) | self.facts)


class _NewEvent(_Line):
    user: Id
    item: Id
    rating: Annotated[FiniteFloat, Field(ge=0, le=HIGHEST_RATING)]
    time: Annotated[int, Field(ge=0, le=LATEST_S)]
    """Seconds since the epoch."""


L = TypeVar("L", bound=_Line)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The dataset with the new entities and events of the files."""

    dataset: Dataset
    """Cut-offs are not moved, except for events before them that arrived late."""
    entities: frozenset[EntityKey]
    """Entities in the files, and users of events in the files, whether new or known."""
    users: int
    """Number of new users."""
    items: int
    """Number of new items."""
    events: int
    """Number of new events."""

    @property
    def any_new(self) -> bool:
        """Whether the dataset has changed."""
        return bool(self.users or self.items or self.events)


def read_arrivals(
    dataset: Dataset, title: str, *, events: Path | None = None, entities: Path | None = None, now: datetime
) -> Arrivals:
    """Read and check both files, and add their new entities and events to a dataset.

    An event is identified by its user, item and time, an entity by its id. A line that repeats a known event or entity
    is skipped; a line that contradicts one is refused.

    Args:
        dataset: The dataset.
        title: Name of the fact that names items in prompts.
        events: The file of events.
        entities: The file of entities.
        now: The time; events of later days are refused.

    Raises:
        InputError: a file cannot be read, or a line is wrong; the message has its number.
    """
    intake = _Intake(dataset, title, latest_s=int((now + CLOCK_TOLERANCE).timestamp()), has_events=events is not None)
    _take_lines(entities, _NewEntity, intake.take_entity)
    _take_lines(events, _NewEvent, intake.take_event)
    return intake.arrivals()


class _Intake:
    """Collects new entities and events, line by line."""

    def __init__(self, dataset: Dataset, title: str, *, latest_s: int, has_events: bool) -> None:
        self._dataset, self._title, self._latest_s = dataset, title, latest_s
        self._layouts = {kind: FeatureLayout(dataset.schema, kind) for kind in EntityKind}
        self._known = {kind: {entity.id: entity for entity in dataset.entities[kind]} for kind in EntityKind}
        self._new: dict[EntityKind, dict[str, Entity]] = {kind: {} for kind in EntityKind}
        self._ratings = _ratings_of_events(dataset) if has_events else {}
        self._new_events: list[_NewEvent] = []
        self._entities: set[EntityKey] = set()

    def take_entity(self, line: _NewEntity) -> None:
        kind, entity = line.entity, line.as_entity
        known = self._known[kind].get(line.id) or self._new[kind].get(line.id)
        if known is not None and known != entity:
            raise InputError(
                f"{kind} {line.id!r} is known with other features or facts: leave it out; `kar publish --features` "
                "takes new features"
            )
        self._layouts[kind].row(entity.features)
        if kind == ITEM and not entity.facts.get(self._title):
            raise InputError(f"item {line.id!r} has no fact {self._title!r}, which names it in prompts: add it")
        if known is None:
            self._new[kind][line.id] = entity
        self._entities.add(EntityKey(kind, line.id))

    def take_event(self, line: _NewEvent) -> None:
        if line.time > self._latest_s and self._dataset.shared_clock:
            raise InputError("time: lies in the future")
        if line.item not in self._known[ITEM] and line.item not in self._new[ITEM]:
            raise InputError(f"item {line.item!r} is not known: add it to --entities")
        event = (line.user, line.item, line.time)
        if event not in self._ratings:
            self._ratings[event] = np.float32(line.rating)
            self._new_events.append(line)
        elif self._ratings[event] != np.float32(line.rating):
            raise InputError(f"this event is known with the rating {self._ratings[event]:g}: leave it out")
        if line.user not in self._known[USER]:
            self._new[USER].setdefault(line.user, Entity(line.user, {}, {}))
        self._entities.add(EntityKey(USER, line.user))

    def arrivals(self) -> Arrivals:
        new, events = self._new, self._new_events
        # Known entities keep their rows, and new ones follow in the order of the file.
        rows = {kind: {id_: row for row, id_ in enumerate((*self._known[kind], *new[kind]))} for kind in EntityKind}
        dataset = self._dataset
        if new[USER] or new[ITEM] or events:
            dataset = dataset.extended(
                list(new[USER].values()),
                list(new[ITEM].values()),
                user=np.array([rows[USER][event.user] for event in events], np.int64),
                item=np.array([rows[ITEM][event.item] for event in events], np.int64),
                rating=np.array([event.rating for event in events], np.float32),
                time=np.array([event.time for event in events], np.int64),
            )
        return Arrivals(dataset, frozenset(self._entities), len(new[USER]), len(new[ITEM]), len(events))


def _ratings_of_events(dataset: Dataset) -> dict[tuple[str, str, int], np.float32]:
    """The rating of each event, by user id, item id and time."""
    user_ids, item_ids = ([entity.id for entity in dataset.entities[kind]] for kind in (USER, ITEM))
    columns = (dataset.event_user.tolist(), dataset.event_item.tolist(), dataset.event_time.tolist())
    events = zip(*columns, dataset.event_rating, strict=True)
    return {(user_ids[user], item_ids[item], time): rating for user, item, time, rating in events}


def _take_lines(path: Path | None, line_type: type[L], take: Callable[[L], None]) -> None:
    """Read a file and hand over its lines.

    Raises:
        InputError: the file cannot be read, or a line is wrong; the message has its number.
    """
    if path is None:
        return
    if not path.is_file():
        raise InputError(f"{path} is not a file: name one with a JSON object a line")
    for _ in each_line(path, line_type, take, "nothing was changed"):
        pass
