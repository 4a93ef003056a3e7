"""Owns what is new: files of entities and events, checked whole, and the dataset that grows by them.

One line an entity that is new, and one an event; a new user of whom nothing but events is known needs no line:
{"entity": ITEM, "id": "i9", "title": "Salt and Lanterns", "features": {"year": 2026}, "facts": {"genres": ["Drama"]}}
{USER: "u1", ITEM: "i9", "rating": 4.0, "time": 1764230400}
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

AHEAD: Final = timedelta(days=1)
"""What clocks may differ by."""


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
    """Short for the fact `title`."""
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
    """What the files hold, and what of it is new."""

    dataset: Dataset
    """The dataset with it; cut-offs are where they were."""
    named: frozenset[EntityKey]
    """The entities that the files give, and the users of their events, new or not."""
    users: int
    """New users."""
    items: int
    """New items."""
    events: int
    """New events."""


def read_arrivals(
    dataset: Dataset, title: str, *, events: Path | None = None, entities: Path | None = None, now: datetime
) -> Arrivals:
    """Read and check both files, and extend a dataset by what it does not know.

    An event is known by its user, item and time, an entity by its id: a line that says again what is known is passed
    over, one that says otherwise is refused.

    Args:
        dataset: The dataset.
        title: The fact that names items in prompts.
        events: The events.
        entities: The entities.
        now: The time: events of later days are refused.

    Raises:
        InputError: a file cannot be read, or a line is wrong; the text has its number.
    """
    layouts = {kind: FeatureLayout(dataset.schema, kind) for kind in EntityKind}
    known: dict[EntityKind, dict[str, Entity]] = {
        USER: {user.id: user for user in dataset.users},
        ITEM: {item.id: item for item in dataset.items},
    }
    fresh: dict[EntityKind, dict[str, Entity]] = {USER: {}, ITEM: {}}
    named: set[EntityKey] = set()

    def enter(line: _NewEntity) -> None:
        kind, entity = line.entity, line.as_entity
        held = known[kind].get(line.id) or fresh[kind].get(line.id)
        if held is not None and held != entity:
            raise InputError(
                f"{line.entity} {line.id!r} is known with other features or facts: leave it out; `kar publish "
                "--features` takes new features"
            )
        layouts[kind].row(entity.features)
        if kind == ITEM and not entity.facts.get(title):
            raise InputError(f"item {line.id!r} has no fact {title!r}, which names it in prompts: add it")
        if held is None:
            fresh[kind][line.id] = entity
        named.add(EntityKey(kind, line.id))

    _each(entities, _NewEntity, enter)
    latest = int((now + AHEAD).timestamp())
    ratings = _ratings(dataset) if events else {}
    new: list[_NewEvent] = []

    def happen(line: _NewEvent) -> None:
        if line.time > latest and dataset.shared_clock:
            raise InputError("time: lies in the future")
        if line.item not in known[ITEM] and line.item not in fresh[ITEM]:
            raise InputError(f"item {line.item!r} is not known: add it to --entities")
        event = (line.user, line.item, line.time)
        if event not in ratings:
            ratings[event] = np.float32(line.rating)
            new.append(line)
        elif ratings[event] != np.float32(line.rating):
            raise InputError(f"this event is known with the rating {ratings[event]:g}: leave it out")
        if line.user not in known[USER]:
            fresh[USER].setdefault(line.user, Entity(line.user, {}, {}))
        named.add(EntityKey(USER, line.user))

    _each(events, _NewEvent, happen)
    # Dictionaries keep the order of the dataset's rows.
    rows = {kind: {id_: row for row, id_ in enumerate((*known[kind], *fresh[kind]))} for kind in EntityKind}
    extended = dataset
    if fresh[USER] or fresh[ITEM] or new:
        extended = dataset.extended(
            list(fresh[USER].values()),
            list(fresh[ITEM].values()),
            user=np.array([rows[USER][line.user] for line in new], np.int64),
            item=np.array([rows[ITEM][line.item] for line in new], np.int64),
            rating=np.array([line.rating for line in new], np.float32),
            time=np.array([line.time for line in new], np.int64),
        )
    return Arrivals(extended, frozenset(named), len(fresh[USER]), len(fresh[ITEM]), len(new))


def _ratings(dataset: Dataset) -> dict[tuple[str, str, int], np.float32]:
    """The rating of each event, by user, item and time."""
    users, items = ([entity.id for entity in of] for of in (dataset.users, dataset.items))
    columns = (dataset.event_user.tolist(), dataset.event_item.tolist(), dataset.event_time.tolist())
    events = zip(*columns, dataset.event_rating, strict=True)
    return {(users[user], items[item], time): rating for user, item, time, rating in events}


def _each(path: Path | None, line_type: type[L], take: Callable[[L], None]) -> None:
    """Have every line of a file taken.

    Raises:
        InputError: the file cannot be read, or a line is wrong; the text has its number.
    """
    if path is None:
        return
    if not path.is_file():
        raise InputError(f"{path} is not a file: name one with a JSON object a line")
    for _ in each_line(path, line_type, take, "nothing was changed"):
        pass
