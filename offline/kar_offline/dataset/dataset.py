"""Owns the leakage-safe dataset: events in time order, prompt cut-offs, samples and their split.

The first `cutoff` events of a user may feed prompts and are never samples; every later event is one. Prompts show the
last `PROMPT_EVENTS` of them. A cut-off only ever moves on (`advanced`), and new events never move one back
(`extended`), so what a text was written from cannot become a sample.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_sidecar.errors import InputError, IntegrityError, PreconditionError

__all__ = [
    "FOLDS",
    "PROMPT_EVENTS",
    "SEED",
    "SPLITS",
    "TEST",
    "TRAIN",
    "VALIDATION",
    "Dataset",
    "Entity",
    "hash_fraction",
    "split_of",
]

TRAIN: Final = 0
VALIDATION: Final = 1
TEST: Final = 2
SPLITS: Final = ("train", "validation", "test")
SEED: Final = 2024
SHARE_SEED: Final = 7919
"""Of the split of users."""
FOLDS: Final = 5
"""Folds of the split of users: one of them is the test split."""
VALIDATION_SHARE: Final = 0.1
"""Of the users that are not in the test split."""
PROMPT_EVENTS: Final = 30
"""The most events of a user that prompts may show."""


def hash_fraction(seed: int, user_id: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}:{user_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def split_of(seed: int, user_id: str, fold: int = 0, folds: int = FOLDS) -> int:
    """The split of a user; other users never move it. Each fold tests on its own interval of hashes."""
    place = (hash_fraction(seed, user_id) - fold / folds) % 1
    if place < 1 / folds:
        return TEST
    return VALIDATION if place < 1 / folds + VALIDATION_SHARE * (1 - 1 / folds) else TRAIN


@dataclass(frozen=True, slots=True)
class Entity:
    """A user or an item: its id, its model features (as in the schema) and facts that prompts may show."""

    id: str
    features: dict[str, Any]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """Users, items and their events. Row i of an id list has row number i everywhere.

    Events are sorted by user row, then (timestamp, item row); user u owns events `offsets[u]:offsets[u + 1]`.
    """

    name: str
    schema: records_pb2.FeatureSchema
    users: Sequence[Entity]
    items: Sequence[Entity]
    offsets: NDArray[np.int64]  # [U + 1]
    event_item: NDArray[np.int32]  # [E] item row
    event_rating: NDArray[np.float32]  # [E]
    event_time: NDArray[np.int64]  # [E] seconds since the epoch
    cutoff: NDArray[np.int32]  # [U] first events that texts may be written from
    event_split: NDArray[np.uint8]  # [E] TRAIN, VALIDATION or TEST
    positive_above: float
    """A sample is positive when its rating is greater than this."""
    split: str = "given"
    """How `event_split` was made, in words."""
    shared_clock: bool = True
    """Whether times of different users can be compared; False where time is only each user's own order."""

    def __post_init__(self) -> None:
        """Check that the arrays belong together and that events are in order.

        Raises:
            IntegrityError: they do not.
        """
        users, events = len(self.users), len(self.event_item)
        lengths = np.diff(self.offsets)
        sound = (
            self.offsets.shape == (users + 1,)
            and self.cutoff.shape == (users,)
            and self.event_rating.shape == self.event_time.shape == self.event_split.shape == (events,)
            and bool((self.event_split < len(SPLITS)).all())
            and (self.offsets[0], self.offsets[-1]) == (0, events)
            and bool((lengths >= 0).all() and (self.cutoff >= 0).all() and (self.cutoff <= lengths).all())
            and bool((self.event_item >= 0).all() and (self.event_item < len(self.items)).all())
            and np.array_equal(np.lexsort((self.event_item, self.event_time, self.event_user)), np.arange(events))
        )
        if not sound:
            raise IntegrityError(f"dataset {self.name} is not consistent (sizes or order of events): build it again")

    @staticmethod
    def from_events(
        name: str,
        schema: records_pb2.FeatureSchema,
        users: Sequence[Entity],
        items: Sequence[Entity],
        *,
        user: NDArray[np.integer],
        item: NDArray[np.integer],
        rating: NDArray[np.floating],
        time: NDArray[np.integer],
        seed: int = SEED,
        positive_above: float,
        shared_clock: bool = True,
    ) -> "Dataset":
        """Sort raw events, cut off what prompts may show and split by user (fold 0).

        `user` and `item` are rows [E], `time` is in seconds [E], any order; items should be sorted by id, since
        events of the same second are ordered by item row.
        """
        order = np.lexsort((item, time, user))
        counts = np.bincount(user, minlength=len(users))
        return Dataset(
            name=name,
            schema=schema,
            users=users,
            items=items,
            offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            event_item=item[order].astype(np.int32),
            event_rating=rating[order].astype(np.float32),
            event_time=time[order].astype(np.int64),
            cutoff=np.minimum((counts + 1) // 2, PROMPT_EVENTS).astype(np.int32),
            event_split=np.zeros(len(order), dtype=np.uint8),
            positive_above=positive_above,
            shared_clock=shared_clock,
        ).split_by_user(seed=seed)

    def extended(
        self,
        users: Sequence[Entity],
        items: Sequence[Entity],
        *,
        user: NDArray[np.integer],
        item: NDArray[np.integer],
        rating: NDArray[np.floating],
        time: NDArray[np.integer],
    ) -> "Dataset":
        """The same with more users, items and events; rows stay, and what texts were written from.

        An event that comes late, before one that a text was written from, falls before the cut-off, too. New users'
        cut-off is 0. New events have the split TRAIN until the dataset is split again.

        Args:
            users: They follow those that are there.
            items: Likewise.
            user: Rows [N], counted through old and new users.
            item: Rows [N].
            rating: [N]
            time: Seconds since the epoch [N].
        """
        known = len(self.event_item)
        users, items = (*self.users, *users), (*self.items, *items)
        columns = (self.event_user, user), (self.event_item, item), (self.event_rating, rating), (self.event_time, time)
        of, which, how, when = (np.concatenate(column) for column in columns)
        order = np.lexsort((which, when, of))
        of, which, how, when = (column[order] for column in (of, which, how, when))
        counts = np.bincount(of, minlength=len(users))
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        place = np.arange(len(of)) - offsets[of]
        written_from = np.zeros(len(of), np.bool_)
        written_from[:known] = np.arange(known) - self.offsets[self.event_user] < self.cutoff[self.event_user]
        written_from = written_from[order]
        cutoff = np.zeros(len(users), np.int32)
        np.maximum.at(cutoff, of[written_from], place[written_from].astype(np.int32) + 1)
        split = np.concatenate((self.event_split, np.full(len(of) - known, TRAIN, np.uint8)))[order]
        return replace(
            self,
            users=users,
            items=items,
            offsets=offsets,
            cutoff=cutoff,
            event_item=which.astype(np.int32),
            event_rating=how.astype(np.float32),
            event_time=when.astype(np.int64),
            event_split=split,
        )

    def advanced(self, users: NDArray[np.integer]) -> "Dataset":
        """The same with the cut-offs of some users, by row, after all their events: texts are written from them now."""
        cutoff = np.zeros_like(self.cutoff)
        cutoff[users] = np.diff(self.offsets)[users]
        return self.advanced_to(cutoff)

    def advanced_to(self, cutoff: NDArray[np.integer]) -> "Dataset":
        """The same with cut-offs of at least `cutoff` [U] events, where there are so many."""
        most = np.minimum(np.maximum(self.cutoff, cutoff), np.diff(self.offsets))
        return replace(self, cutoff=most.astype(np.int32))

    def split_by_user(self, fold: int = 0, folds: int = FOLDS, seed: int = SEED) -> "Dataset":
        """The same events, all of a user's in one split: the users of one fold are the test split.

        Raises:
            InputError: there is no such fold.
        """
        if not (0 <= fold < folds and folds > 1):
            raise InputError(f"fold {fold} of {folds} does not exist: give at least 2 folds, and count them from 0")
        of_user = np.array([split_of(seed, user.id, fold, folds) for user in self.users], dtype=np.uint8)
        said = f"users, fold {fold} of {folds}, seed {seed}"
        return replace(self, event_split=of_user[self.event_user], split=said)

    def with_less_training(self, share: float) -> "Dataset":
        """The same without the events of some training users: about `share` of them stay, those of less among them."""
        trains = np.zeros(len(self.users), np.bool_)
        trains[self.event_user[self.event_split == TRAIN]] = True
        stays = np.array([hash_fraction(SHARE_SEED, user.id) < share for user in self.users]) | ~trains
        kept = stays[self.event_user]
        return replace(
            self,
            offsets=np.concatenate(([0], np.cumsum(np.where(stays, np.diff(self.offsets), 0)))),
            cutoff=np.where(stays, self.cutoff, 0).astype(np.int32),
            event_item=self.event_item[kept],
            event_rating=self.event_rating[kept],
            event_time=self.event_time[kept],
            event_split=self.event_split[kept],
            split=f"{self.split}, {share:.0%} of the training users",
        )

    def split_by_time(self, test_share: float = 0.2, validation_share: float = 0.08) -> "Dataset":
        """The same events, those of the last `test_share` of samples and later ones as the test split.

        Shares are of samples; events of one second stay together, in the later split.

        Raises:
            PreconditionError: users have no clock in common, or a split would be empty.
        """
        if not self.shared_clock:
            raise PreconditionError(f"{self.name} has no times, only each user's order of events: split it by user")
        times = np.sort(self.event_time[self.sample_events])
        shares = (1 - test_share - validation_share, 1 - test_share)
        starts = [times[min(round(share * len(times)), len(times) - 1)] for share in shares if len(times)]
        split = np.searchsorted(starts, self.event_time, side="right").astype(np.uint8)
        said = f"time, last {test_share:.0%} of samples for test and {validation_share:.0%} before for validation"
        dataset = replace(self, event_split=split, split=said)
        if empty := [name for number, name in enumerate(SPLITS) if not len(dataset.samples(number))]:
            raise PreconditionError(f"a split by time leaves no {empty[0]} samples in {self.name}: split it by user")
        return dataset

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
        return self.sample_events[self.event_split[self.sample_events] == split]

    @cached_property
    def labels(self) -> NDArray[np.float32]:
        """Label of every event [E]: 1 when its rating is above `positive_above`."""
        return (self.event_rating > self.positive_above).astype(np.float32)

    def written_from(self, user: int) -> slice:
        """The events of a user row before its cut-off."""
        start = int(self.offsets[user])
        return slice(start, start + int(self.cutoff[user]))

    def prompt_events(self, user: int) -> slice:
        """The events of a user row that prompts show: the last `PROMPT_EVENTS` before its cut-off."""
        before = self.written_from(user)
        return slice(max(before.start, before.stop - PROMPT_EVENTS), before.stop)

    def history(self, event: int, length: int) -> slice:
        """The events that a model may see for a sample: the last `length` of its user's before it."""
        start = int(self.offsets[self.event_user[event]])
        return slice(max(start, event - length), event)

    def history_windows(
        self, events: NDArray[np.integer], length: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """`history` of many sample events [S] at once: item rows [S, L] and ratings [S, L], oldest first.

        Right-padded, as the models read them: item row -1 and rating 0 where the history is shorter than L.
        """
        first = np.maximum(self.offsets[self.event_user[events]], events - length)
        window = first[:, None] + np.arange(length)
        seen = window < events[:, None]
        window = np.where(seen, window, 0)
        items = np.where(seen, self.event_item[window], -1).astype(np.int32)
        return items, np.where(seen, self.event_rating[window], 0).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `dataset.json`, `users.jsonl`, `items.jsonl` and `events.npz` into a folder."""
        schema = json_format.MessageToDict(self.schema, preserving_proto_field_name=True)
        header = {**{name: getattr(self, name) for name in self._VALUES}, "schema": schema}
        (folder / "dataset.json").write_text(json.dumps(header, indent=2) + "\n")
        for name, entities in (("users", self.users), ("items", self.items)):
            lines = ({"id": e.id, "features": e.features, "facts": e.facts} for e in entities)
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        arrays = {name: getattr(self, name) for name in self._ARRAYS}
        np.savez(folder / "events.npz", **arrays)

    @staticmethod
    def load(folder: Path) -> "Dataset":
        """Read what `save` wrote.

        Raises:
            PreconditionError: there is no dataset in the folder.
            IntegrityError: a file is missing or corrupt.
        """
        if not (folder / "dataset.json").is_file():
            raise PreconditionError(f"no dataset in {folder}: run `kar dataset` first")
        try:
            header = json.loads((folder / "dataset.json").read_text())
            schema = json_format.ParseDict(header["schema"], records_pb2.FeatureSchema())
            users, items = (
                [Entity(**json.loads(line)) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
                for name in ("users", "items")
            )
            with np.load(folder / "events.npz", allow_pickle=False) as arrays:
                events: dict[str, Any] = {name: arrays[name] for name in Dataset._ARRAYS}
            values = {name: header[name] for name in Dataset._VALUES}
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            zipfile.BadZipFile,
            json_format.ParseError,
        ) as error:
            raise IntegrityError(
                f"the dataset in {folder} is corrupt ({error}): remove it and build it again"
            ) from error
        return Dataset(schema=schema, users=users, items=items, **values, **events)

    _ARRAYS = ("offsets", "event_item", "event_rating", "event_time", "cutoff", "event_split")
    _VALUES = ("name", "positive_above", "split", "shared_clock")
