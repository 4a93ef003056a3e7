"""Owns what an arm is given on each morning of a simulated month: vectors of the texts that are in use by then.

An item has its own text, if it was asked about and the text passed; else, once it was seen, it may borrow from those
most like it by raw text; before, nothing is known of it. A user has the latest version of its text, or nothing. Text
affinities of all mornings are computed in one vector space, learned on the month's first morning, as a release would.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kar_bench.studies.freshness_simulation import NEVER, Month, SimulatedHistory
from kar_offline.knowledge.imputation import impute_from_neighbours
from kar_offline.train.arms import Arm
from kar_offline.train.features import EncodedDataset
from kar_offline.train.knowledge_inputs import TEXT, WIDTH, AffinityInput, KnowledgeInputs
from kar_offline.train.principal_components import Components
from kar_offline.train.samples import Samples, samples_before
from kar_offline.train.vectors import TextVectors
from kar_sidecar.ranking.affinity import affinity_columns

__all__ = ["Mornings"]

STANDARD: Final = 8192
"""Training rows that affinity columns are standardised on, about."""


@dataclass(frozen=True)
class Mornings:
    """One life, and what an arm is given on each of its mornings."""

    month: Month
    life: SimulatedHistory
    arm: Arm
    data: EncodedDataset
    """With a row of users for each one without a text, then one for each version of a text."""
    texts: TextVectors
    """Of all items, asked about or not; of users, by row of `data`."""
    raw: NDArray[np.float32]
    """[items, D] of raw texts."""
    user_row: NDArray[np.int64]
    """[E] row of users in `data` by event."""
    on_loans: bool
    """Whether training sees borrowed vectors, too."""

    @staticmethod
    def of(
        month: Month,
        data: EncodedDataset,
        life: SimulatedHistory,
        arm: Arm,
        released: TextVectors,
        raw: NDArray[np.float32],
        versions: NDArray[np.float32],
        *,
        on_loans: bool = False,
    ) -> "Mornings":
        """Put together what there is.

        Args:
            month: The log.
            data: Its arrays.
            life: What was bought.
            arm: What reads it.
            released: Texts about items, in place of answers.
            raw: Vectors [items, D] of raw texts, by which items are alike.
            versions: Vectors [versions, D] of texts about users, in the order of `life.versions`.
            on_loans: Whether training sees borrowed vectors, too.
        """
        users = len(month.dataset.users)
        of = torch.tensor([*range(users), *(call.row for call in life.versions)])
        columns = {name: column[of] if name.startswith("user_") else column for name, column in data.columns.items()}
        texts = replace(
            released,
            user=torch.cat([torch.zeros(users, released.dim), torch.from_numpy(versions)]),
            user_present=torch.arange(len(of)) >= users,
        )
        version = life.version_at(month)
        user_row = np.where(version < 0, month.dataset.event_user, users + version)
        return Mornings(month, life, arm, replace(data, columns=columns), texts, raw, user_row, on_loans)

    def samples(self, events: NDArray[np.int64]) -> Samples:
        """Rows of these events, each with the text about its user that was in use on its morning."""
        dataset = self.month.dataset
        found = samples_before(self.data, events, dataset.event_item[events], dataset.labels[events])
        return replace(found, user=torch.from_numpy(self.user_row[events]))

    def items(self, day: int, *, lending: bool = True) -> tuple[Tensor, Tensor]:
        """Vectors [items, D] and presence [items] on the morning of `day`; without `lending` nobody borrows."""
        own = (self.life.asked(len(self.raw)) < day) & self.texts.item_present.numpy()
        vectors = np.where(own[:, None], self.texts.item.numpy(), np.float32(0))
        if not lending:
            return torch.from_numpy(vectors), torch.from_numpy(own)
        seen = self.month.item_day < day
        found, lent = impute_from_neighbours(np.where(seen[:, None], self.raw, np.float32(0)), own, vectors)
        return torch.from_numpy(found), torch.from_numpy(own | lent)

    @cached_property
    def _components(self) -> Components | None:
        vectors, present = self.items(self.month.first, lending=self.on_loans)
        return Components.of(vectors[present], WIDTH) if present.any() else None

    def given(self, day: int, learned: KnowledgeInputs | None = None, *, lending: bool = True) -> KnowledgeInputs:
        """What the arm is given on the morning of `day`, its columns scaled as in `learned`."""
        dataset = self.month.dataset
        if not self.arm.texts:
            return KnowledgeInputs(self.arm, dataset)
        item, present = self.items(day, lending=lending)
        texts = replace(self.texts, item=item, item_present=present)
        if not self.arm.text_affinity:
            return KnowledgeInputs(self.arm, dataset, texts)
        table, columns = torch.zeros(len(item), WIDTH), affinity_columns(1)
        if self._components:
            table[present] = self._components.project(item[present])
        blank = AffinityInput(((TEXT, WIDTH),), table, torch.zeros(columns), torch.ones(columns))
        known = learned.affinity if learned else None
        affinity = replace(blank, mean=known.mean, scale=known.scale) if known else blank
        tables = np.pad(table.numpy(), ((0, 1), (0, 0)))[None]
        return KnowledgeInputs(self.arm, dataset, texts, affinity, tables, np.zeros(len(texts.user), np.int64))

    def learned(self, train: Samples) -> KnowledgeInputs:
        """What the arm is given on the month's first morning, columns standardised on the rows of `train`."""
        given = self.given(self.month.first, lending=self.on_loans)
        if given.affinity is None:
            return given
        raw = given.affinity_columns(train.rows(torch.arange(0, len(train), max(1, len(train) // STANDARD))))
        scale = raw.std(0)
        scale = torch.where(scale > 0, scale, torch.ones(len(scale)))
        return replace(given, affinity=replace(given.affinity, mean=raw.mean(0), scale=scale))

    def levels(self, events: NDArray[np.int64], *, lending: bool = True) -> dict[str, Any]:
        """How well the items and users of these events were known on their mornings.

        `item` and `user` are shares of events by level. `age_days` is the age of own texts, on average over the events
        that have one; `unknown_ratio` the share of what a user had done by that morning that its text does not tell
        (1 without a text), on average over events of users who had done something.
        """
        month, life = self.month, self.life
        day, item = month.event_day[events], month.dataset.event_item[events]
        has_text = self.texts.item_present.numpy()
        asked = np.where(has_text, life.asked(len(has_text)), NEVER)
        full = asked[item] < day
        lent = lending & ~full & (month.item_day[item] < day) & (asked.min() < day)
        version = self.user_row[events] - len(month.dataset.users)
        told = version >= 0
        written = np.array([(call.day, call.cutoff) for call in life.versions] or [(0, 0)])[np.maximum(version, 0)]
        before = month.events_by_morning[events]
        seen = before > 0
        unknown = 1 - np.where(told, written[:, 1], 0)[seen] / before[seen]
        return {
            "item": {"full": _mean(full), "lent": _mean(lent), "neutral": _mean(~(full | lent))},
            "user": {"full": _mean(told), "neutral": _mean(~told)},
            "age_days": {"item": _mean(day[full] - asked[item][full]), "user": _mean(day[told] - written[told, 0])},
            "unknown_ratio": _mean(unknown),
        }


def _mean(values: NDArray | Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
