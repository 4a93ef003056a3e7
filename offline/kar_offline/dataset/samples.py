"""Owns the leakage-safe dataset: events in time order, prompt cut-offs, samples and their split.

The first `cutoff` events of a user may feed prompts and are never samples; every later event is one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf import json_format
from kar.records.v1 import records_pb2
from numpy.typing import NDArray

__all__ = ["SPLITS", "TEST", "TRAIN", "VALIDATION", "Dataset", "Entity"]

TRAIN: Final = 0
VALIDATION: Final = 1
TEST: Final = 2
SPLITS: Final = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Entity:
    """A user or an item: its id, its model features (as in the schema) and facts that prompts may show."""

    id: str
    features: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """Users, items and their events. Row i of an id list has row number i everywhere.

    Events are sorted by user row, then (timestamp, item id); user u owns events `offsets[u]:offsets[u + 1]`.
    """

    name: str
    schema: records_pb2.FeatureSchema
    users: Sequence[Entity]
    items: Sequence[Entity]
    offsets: NDArray[np.int64]  # [U + 1]
    event_item: NDArray[np.int32]  # [E] item row
    event_rating: NDArray[np.float32]  # [E]
    event_time: NDArray[np.int64]  # [E] seconds since the epoch
    cutoff: NDArray[np.int32]  # [U] events that prompts may show
    user_split: NDArray[np.uint8]  # [U] TRAIN, VALIDATION or TEST
    positive_above: float
    """A sample is positive when its rating is greater than this."""

    @cached_property
    def event_user(self) -> NDArray[np.int32]:
        """User row of each event [E]."""
        return np.repeat(np.arange(len(self.users), dtype=np.int32), np.diff(self.offsets))

    @cached_property
    def sample_events(self) -> NDArray[np.int64]:
        """Event numbers [S] of all samples: every event at or after its user's cut-off."""
        position = np.arange(len(self.event_item)) - self.offsets[self.event_user]
        return np.flatnonzero(position >= self.cutoff[self.event_user])

    def samples(self, split: int) -> NDArray[np.int64]:
        """Event numbers of the samples of one split."""
        return self.sample_events[self.user_split[self.event_user[self.sample_events]] == split]

    @cached_property
    def labels(self) -> NDArray[np.float32]:
        """Label of every event [E]: 1 when its rating is above `positive_above`."""
        return (self.event_rating > self.positive_above).astype(np.float32)

    def history(self, event: int, length: int) -> slice:
        """The events that a model may see for a sample: the last `length` of its user's before it."""
        start = int(self.offsets[self.event_user[event]])
        return slice(max(start, event - length), event)

    def save(self, folder: Path) -> None:
        """Write `dataset.json`, `users.jsonl`, `items.jsonl` and `events.npz` into a folder."""
        schema = json_format.MessageToDict(self.schema, preserving_proto_field_name=True)
        header = {"name": self.name, "positive_above": self.positive_above, "schema": schema}
        (folder / "dataset.json").write_text(json.dumps(header, indent=2) + "\n")
        for name, entities in (("users", self.users), ("items", self.items)):
            lines = ({"id": e.id, "features": e.features, "facts": e.facts} for e in entities)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        arrays = {name: getattr(self, name) for name in self._ARRAYS}
        np.savez(folder / "events.npz", **arrays)

    @staticmethod
    def load(folder: Path) -> "Dataset":
        """Read what `save` wrote."""
        header = json.loads((folder / "dataset.json").read_text())
        schema = json_format.ParseDict(header["schema"], records_pb2.FeatureSchema())
        users, items = (
            [Entity(**json.loads(line)) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("users", "items")
        )
        with np.load(folder / "events.npz", allow_pickle=False) as arrays:
            events: dict[str, Any] = {name: arrays[name] for name in Dataset._ARRAYS}
        return Dataset(
            name=header["name"],
            schema=schema,
            users=users,
            items=items,
            positive_above=header["positive_above"],
            **events,
        )

    _ARRAYS = ("offsets", "event_item", "event_rating", "event_time", "cutoff", "user_split")
