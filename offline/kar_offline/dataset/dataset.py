"""Owns the leakage-safe dataset: events in time order, prompt cut-offs, samples and their split.

The first `cutoff` events of a user may be shown in prompts and are never samples; every later event is a sample.
Prompts show the last `PROMPT_EVENTS` events before the cut-off. Neither a refresh (`advanced`) nor new events
(`extended`) move a cut-off back, so an event that a text was written from never becomes a sample.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.dataset.entities import Entity, EntityTables, load_entities, save_entities
from kar_offline.dataset.splits import FOLDS, SEED, SPLITS, TRAIN, hash_fraction, split_by_time, split_by_user
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.errors import IntegrityError, PreconditionError

__all__ = ["PROMPT_EVENTS", "Dataset"]

SUBSET_SEED: Final = 7919
"""Seed of the choice of users in `Dataset.with_less_training`; not that of the splits, so the two are independent."""
PROMPT_EVENTS: Final = 30
"""Maximal number of a user's events in a prompt."""
HEADER: Final = "dataset.json"
EVENTS: Final = "events.npz"
EVENT_ARRAYS: Final = ("offsets", "event_item", "event_rating", "event_time", "cutoff", "event_split")
"""Fields of `Dataset` in `EVENTS`."""
HEADER_VALUES: Final = ("name", "positive_above", "split", "shared_clock")
"""Fields of `Dataset` in `HEADER`, beside the feature schema."""


@dataclass(frozen=True)
class Dataset:
    """U users, I items and E events. An entity's row number is its place in `users` or `items`.

    Events are sorted by user row, then time, then item row; user u has the events `offsets[u]:offsets[u + 1]`.
    """

    FOLDER: ClassVar[str] = "dataset"
    """Its folder in a work folder."""

    name: str
    schema: records_pb2.FeatureSchema
    users: Sequence[Entity]
    items: Sequence[Entity]
    offsets: NDArray[np.int64]  # [U + 1]
    event_item: NDArray[np.int32]  # [E] item row
    event_rating: NDArray[np.float32]  # [E]
    event_time: NDArray[np.int64]  # [E] seconds since the epoch
    cutoff: NDArray[np.int32]  # [U] number of a user's first events that texts may be written from
    event_split: NDArray[np.uint8]  # [E] TRAIN, VALIDATION or TEST
    positive_above: float
    """A sample is positive when its rating is greater than this."""
    split: str = "given"
    """How the events were split, in words."""
    shared_clock: bool = True
    """Whether times of different users can be compared; False if a time only orders a user's events."""

    def __post_init__(self) -> None:
        """Check the sizes of the arrays, their ranges and the order of events.

        Raises:
            IntegrityError: a check fails.
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
        """Sort raw events, set the cut-offs and split by user (fold 0).

        Args:
            name: Name of the data in reports.
            schema: The features that models read.
            users: The users.
            items: The items, sorted by id: events of one second are ordered by item row.
            user: User row of each event [E], in any order of events.
            item: Item row of each event [E].
            rating: Ratings [E].
            time: Seconds since the epoch [E].
            seed: Seed of the split.
            positive_above: A sample is positive when its rating is greater than this.
            shared_clock: Whether times of different users can be compared.
        """
        order = np.lexsort((item, time, user))
        counts = np.bincount(user, minlength=len(users))
        return Dataset(
            name=name,
            schema=schema,
            users=users,
            items=items,
            offsets=_offsets(counts),
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
        """This dataset with more users, items and events; entities that were there before keep their rows.

        A new event that is older than an event before the cut-off falls before the cut-off, too. New users have a
        cut-off of 0. New events have the split TRAIN until the dataset is split again.

        Args:
            users: New users; they get the rows after the present users.
            items: New items; they get the rows after the present items.
            user: User row of each new event [N].
            item: Item row of each new event [N].
            rating: Ratings [N].
            time: Seconds since the epoch [N].
        """
        event_count = len(self.event_item)  # before the extension
        users, items = (*self.users, *users), (*self.items, *items)
        user = np.concatenate((self.event_user, user))
        item = np.concatenate((self.event_item, item))
        rating = np.concatenate((self.event_rating, rating))
        time = np.concatenate((self.event_time, time))
        split = np.concatenate((self.event_split, np.full(len(user) - event_count, TRAIN, np.uint8)))
        before_cutoff = np.zeros(len(user), np.bool_)
        before_cutoff[:event_count] = (
            np.arange(event_count) - self.offsets[self.event_user] < self.cutoff[self.event_user]
        )
        order = np.lexsort((item, time, user))
        user, before_cutoff = user[order], before_cutoff[order]
        offsets = _offsets(np.bincount(user, minlength=len(users)))
        position = np.arange(len(user)) - offsets[user]
        cutoff = np.zeros(len(users), np.int32)
        np.maximum.at(cutoff, user[before_cutoff], position[before_cutoff].astype(np.int32) + 1)
        return replace(
            self,
            users=users,
            items=items,
            offsets=offsets,
            cutoff=cutoff,
            event_item=item[order].astype(np.int32),
            event_rating=rating[order].astype(np.float32),
            event_time=time[order].astype(np.int64),
            event_split=split[order],
        )

    def advanced(self, users: NDArray[np.integer]) -> "Dataset":
        """A dataset in which the cut-offs of `users`, given by row, lie after all their events."""
        cutoff = np.zeros_like(self.cutoff)
        cutoff[users] = np.diff(self.offsets)[users]
        return self.advanced_to(cutoff)

    def advanced_to(self, cutoff: NDArray[np.integer]) -> "Dataset":
        """A dataset whose cut-offs are at least `cutoff` [U], or the user's number of events if that is less."""
        advanced = np.minimum(np.maximum(self.cutoff, cutoff), np.diff(self.offsets))
        return replace(self, cutoff=advanced.astype(np.int32))

    def split_by_user(self, fold: int = 0, folds: int = FOLDS, seed: int = SEED) -> "Dataset":
        """A dataset with all events of a user in one split; the users of one fold are the test split.

        Raises:
            InputError: there is no such fold.
        """
        user_split = split_by_user([user.id for user in self.users], fold, folds, seed)
        description = f"users, fold {fold} of {folds}, seed {seed}"
        return replace(self, event_split=user_split[self.event_user], split=description)

    def split_by_time(self, test_share: float = 0.2, validation_share: float = 0.08) -> "Dataset":
        """A dataset whose latest samples are the test split; see `kar_offline.dataset.splits.split_by_time`.

        Raises:
            PreconditionError: times of different users cannot be compared, or a split would be empty.
        """
        if not self.shared_clock:
            raise PreconditionError(f"{self.name} has no times, only each user's order of events: split it by user")
        event_split = split_by_time(self.event_time, self.sample_events, test_share, validation_share)
        shares = f"last {test_share:.0%} of samples for test and {validation_share:.0%} before for validation"
        dataset = replace(self, event_split=event_split, split=f"time, {shares}")
        if empty := [name for number, name in enumerate(SPLITS) if not len(dataset.samples(number))]:
            raise PreconditionError(f"a split by time leaves no {empty[0]} samples in {self.name}: split it by user")
        return dataset

    def with_less_training(self, share: float) -> "Dataset":
        """A dataset with the events of about `share` of the training users; a smaller share keeps a subset of them."""
        in_training = np.zeros(len(self.users), np.bool_)
        in_training[self.event_user[self.event_split == TRAIN]] = True
        kept_user = np.array([hash_fraction(SUBSET_SEED, user.id) < share for user in self.users]) | ~in_training
        kept = kept_user[self.event_user]
        return replace(
            self,
            offsets=np.concatenate(([0], np.cumsum(np.where(kept_user, np.diff(self.offsets), 0)))),
            cutoff=np.where(kept_user, self.cutoff, 0).astype(np.int32),
            event_item=self.event_item[kept],
            event_rating=self.event_rating[kept],
            event_time=self.event_time[kept],
            event_split=self.event_split[kept],
            split=f"{self.split}, {share:.0%} of the training users",
        )

    @property
    def entities(self) -> EntityTables:
        """Users and items by kind of entity."""
        return {USER: self.users, ITEM: self.items}

    @cached_property
    def event_user(self) -> NDArray[np.int32]:
        """User row of each event [E]."""
        return np.repeat(np.arange(len(self.users), dtype=np.int32), np.diff(self.offsets))

    @cached_property
    def sample_events(self) -> NDArray[np.int64]:
        """Event numbers [S] of all samples, the events at or after their user's cut-off."""
        position = np.arange(len(self.event_item)) - self.offsets[self.event_user]
        return np.flatnonzero(position >= self.cutoff[self.event_user])

    def samples(self, split: int) -> NDArray[np.int64]:
        """Event numbers [n] int64 of the samples of one split, such as `TEST`."""
        return self.sample_events[self.event_split[self.sample_events] == split]

    @cached_property
    def labels(self) -> NDArray[np.float32]:
        """Label of every event [E]: 1 when its rating is above `positive_above`."""
        return (self.event_rating > self.positive_above).astype(np.float32)

    def written_from(self, user: int) -> slice:
        """The events before a user's cut-off, which texts may be written from; `user` is a row."""
        start = int(self.offsets[user])
        return slice(start, start + int(self.cutoff[user]))

    def prompt_events(self, user: int) -> slice:
        """The events of a user that prompts show, the last `PROMPT_EVENTS` before the cut-off; `user` is a row."""
        before_cutoff = self.written_from(user)
        return slice(max(before_cutoff.start, before_cutoff.stop - PROMPT_EVENTS), before_cutoff.stop)

    def history(self, event: int, length: int) -> slice:
        """The history of a sample: the last `length` events of the same user before event number `event`."""
        start = int(self.offsets[self.event_user[event]])
        return slice(max(start, event - length), event)

    def history_windows(
        self, events: NDArray[np.integer], length: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Histories of many samples at once, oldest event first and padded on the right.

        Args:
            events: Event numbers [S].
            length: Events L of a history.

        Returns:
            Item rows [S, L] and ratings [S, L]; where padded, the item row is -1 and the rating 0.
        """
        first = np.maximum(self.offsets[self.event_user[events]], events - length)
        window = first[:, None] + np.arange(length)  # [S, L]
        in_history = window < events[:, None]
        window = np.where(in_history, window, 0)
        items = np.where(in_history, self.event_item[window], -1).astype(np.int32)
        return items, np.where(in_history, self.event_rating[window], 0).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write `dataset.json`, `users.jsonl`, `items.jsonl` and `events.npz` into a folder."""
        schema = json_format.MessageToDict(self.schema, preserving_proto_field_name=True)
        header = {**{name: getattr(self, name) for name in HEADER_VALUES}, "schema": schema}
        (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n")
        save_entities(folder, self.entities)
        np.savez(folder / EVENTS, **{name: getattr(self, name) for name in EVENT_ARRAYS})

    @staticmethod
    def load(folder: Path) -> "Dataset":
        """Read the files of `save`.

        Raises:
            PreconditionError: there is no dataset in the folder.
            IntegrityError: a file is missing or corrupt.
        """
        if not (folder / HEADER).is_file():
            raise PreconditionError(f"no dataset in {folder}: run `kar dataset` first")
        try:
            header = json.loads((folder / HEADER).read_text())
            schema = json_format.ParseDict(header["schema"], records_pb2.FeatureSchema())
            entities = load_entities(folder)
            with np.load(folder / EVENTS, allow_pickle=False) as file:
                arrays: dict[str, Any] = {name: file[name] for name in EVENT_ARRAYS}
            values = {name: header[name] for name in HEADER_VALUES}
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
        return Dataset(schema=schema, users=entities[USER], items=entities[ITEM], **values, **arrays)


def _offsets(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """First event of each user [U + 1], from the users' numbers of events [U]."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
