"""Owns a model's knowledge inputs on each morning of a simulated month: the vectors of the texts in use by then.

An item that was asked about has the vector of its own text, if the text passed the gates. Otherwise, once the item has
been seen, its vector may be imputed from the items that are most like it by raw text. Before that it has none. A user
has the vector of the latest version of the user's text, or none. The text affinities of all mornings are computed in
one vector space, learned on the first morning of the month, as a release does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kar_bench.studies.freshness.simulation import NEVER, Month, SimulatedHistory
from kar_offline.knowledge.imputation import impute_from_neighbours
from kar_offline.train.arms import Arm
from kar_offline.train.features import EncodedDataset
from kar_offline.train.knowledge_inputs import TEXT, WIDTH, AffinityInput, KnowledgeInputs
from kar_offline.train.principal_components import Components
from kar_offline.train.samples import Samples, samples_before
from kar_offline.train.vectors import TextVectors
from kar_sidecar.ranking.affinity import affinity_columns

__all__ = ["AgeInDays", "ItemLevels", "KnowledgeByMorning", "KnowledgeLevels", "UserLevels"]

STANDARDISED_ROWS: Final = 8192
"""Number of training rows, about, from which mean and scale of affinity columns are taken."""


class ItemLevels(NamedTuple):
    """Shares of events by the knowledge of their items."""

    full: float | None
    """The item has its own text."""
    lent: float | None
    """The item's vector is imputed."""
    neutral: float | None
    """The item has no vector."""


class UserLevels(NamedTuple):
    """Shares of events by the knowledge of their users."""

    full: float | None
    neutral: float | None


class AgeInDays(NamedTuple):
    """Mean age of own texts, over the events that have one; None: no event has."""

    item: float | None
    user: float | None


class KnowledgeLevels(NamedTuple):
    """How much was known about the items and users of events on the mornings of their days."""

    item: ItemLevels
    user: UserLevels
    age_days: AgeInDays
    unknown_ratio: float | None
    """Share of a user's events by that morning that the user's text does not know (1 without a text), on average over
    the events whose users had earlier events."""


@dataclass(frozen=True)
class KnowledgeByMorning:
    """The knowledge inputs of one arm on each morning of one simulated history."""

    month: Month
    history: SimulatedHistory
    arm: Arm
    data: EncodedDataset
    """Its rows of users: first each user without a text, then each version of a text."""
    texts: TextVectors
    """Vectors of all items, asked about or not; of users, by row of `data`."""
    raw: NDArray[np.float32]
    """[items, D] vectors of raw texts."""
    user_row: NDArray[np.int64]
    """[E] row of each event's user in `data`."""
    train_imputed: bool
    """Whether training sees imputed vectors."""

    @staticmethod
    def of(
        month: Month,
        data: EncodedDataset,
        history: SimulatedHistory,
        arm: Arm,
        released: TextVectors,
        raw: NDArray[np.float32],
        versions: NDArray[np.float32],
        *,
        train_imputed: bool = False,
    ) -> "KnowledgeByMorning":
        """Combine a log, a history of calls, and the vectors of texts.

        Args:
            month: The log.
            data: Its arrays.
            history: The calls that were bought.
            arm: The arm that reads the texts.
            released: Released texts about items, in place of a language model's answers.
            raw: Vectors [items, D] of raw texts, by which items are alike.
            versions: Vectors [versions, D] of texts about users, in the order of `history.versions`.
            train_imputed: Whether training sees imputed vectors.
        """
        users = len(month.dataset.users)
        rows = torch.tensor([*range(users), *(call.row for call in history.versions)])
        columns = {name: column[rows] if name.startswith("user_") else column for name, column in data.columns.items()}
        texts = replace(
            released,
            user=torch.cat([torch.zeros(users, released.dim), torch.from_numpy(versions)]),
            user_present=torch.arange(len(rows)) >= users,
        )
        version = history.version_at(month)
        user_row = np.where(version < 0, month.dataset.event_user, users + version)
        data = replace(data, columns=columns)
        return KnowledgeByMorning(month, history, arm, data, texts, raw, user_row, train_imputed)

    def samples(self, events: NDArray[np.int64]) -> Samples:
        """Rows of these events, each with the version of the user's text in use on its morning."""
        dataset = self.month.dataset
        samples = samples_before(self.data, events, dataset.event_item[events], dataset.labels[events])
        return replace(samples, user=torch.from_numpy(self.user_row[events]))

    def items(self, day: int, *, impute: bool = True) -> tuple[Tensor, Tensor]:
        """Vectors [items, D] and presence [items] on the morning of `day`; without `impute` own texts only."""
        own = (self.history.asked_on(len(self.raw)) < day) & self.texts.item_present.numpy()
        vectors = np.where(own[:, None], self.texts.item.numpy(), np.float32(0))
        if not impute:
            return torch.from_numpy(vectors), torch.from_numpy(own)
        seen = self.month.item_day < day
        content = np.where(seen[:, None], self.raw, np.float32(0))
        result = impute_from_neighbours(content, own, vectors)
        return torch.from_numpy(result.vectors), torch.from_numpy(own | result.imputed)

    @cached_property
    def _components(self) -> Components | None:
        vectors, present = self.items(self.month.first, impute=self.train_imputed)
        return Components.of(vectors[present], WIDTH) if present.any() else None

    def inputs(self, day: int, learned: KnowledgeInputs | None = None, *, impute: bool = True) -> KnowledgeInputs:
        """The arm's inputs on the morning of `day`, with affinity columns scaled as in `learned`."""
        dataset = self.month.dataset
        if not self.arm.texts:
            return KnowledgeInputs(self.arm, dataset)
        item, present = self.items(day, impute=impute)
        texts = replace(self.texts, item=item, item_present=present)
        if not self.arm.text_affinity:
            return KnowledgeInputs(self.arm, dataset, texts)
        table, columns = torch.zeros(len(item), WIDTH), affinity_columns(1)
        if self._components:
            table[present] = self._components.project(item[present])
        unscaled = AffinityInput(((TEXT, WIDTH),), table, torch.zeros(columns), torch.ones(columns))
        known = learned.affinity if learned else None
        affinity = replace(unscaled, mean=known.mean, scale=known.scale) if known else unscaled
        tables = np.pad(table.numpy(), ((0, 1), (0, 0)))[None]
        return KnowledgeInputs(self.arm, dataset, texts, affinity, tables, np.zeros(len(texts.user), np.int64))

    def training_inputs(self, train: Samples) -> KnowledgeInputs:
        """The arm's inputs on the first morning of the month, with affinity columns standardised on rows of `train`."""
        inputs = self.inputs(self.month.first, impute=self.train_imputed)
        if inputs.affinity is None:
            return inputs
        step = max(1, len(train) // STANDARDISED_ROWS)
        raw = inputs.affinity_columns(train.rows(torch.arange(0, len(train), step)))
        scale = raw.std(0)
        scale = torch.where(scale > 0, scale, torch.ones(len(scale)))
        return replace(inputs, affinity=replace(inputs.affinity, mean=raw.mean(0), scale=scale))

    def levels(self, events: NDArray[np.int64], *, impute: bool = True) -> KnowledgeLevels:
        """How much was known about the items and users of these events."""
        month, history = self.month, self.history
        day, item = month.event_day[events], month.dataset.event_item[events]
        has_text = self.texts.item_present.numpy()
        asked_on = np.where(has_text, history.asked_on(len(has_text)), NEVER)
        full = asked_on[item] < day
        imputed = impute & ~full & (month.item_day[item] < day) & (asked_on.min() < day)
        version = self.user_row[events] - len(month.dataset.users)
        has_version = version >= 0
        calls = np.array([(call.day, call.cutoff) for call in history.versions] or [(0, 0)])[np.maximum(version, 0)]
        call_day, cutoff = calls.T
        before = month.events_by_morning[events]
        earlier = before > 0
        unknown = 1 - np.where(has_version, cutoff, 0)[earlier] / before[earlier]
        return KnowledgeLevels(
            ItemLevels(_mean(full), _mean(imputed), _mean(~(full | imputed))),
            UserLevels(_mean(has_version), _mean(~has_version)),
            AgeInDays(_mean(day[full] - asked_on[item][full]), _mean(day[has_version] - call_day[has_version])),
            _mean(unknown),
        )


def _mean(values: NDArray | Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
