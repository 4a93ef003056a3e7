"""Owns the knowledge inputs of an arm: text encodings, affinity columns and affinity vectors, beside the logs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kar_kernels import Tower
from kar_offline.dataset.dataset import Dataset
from kar_offline.models import InputSpec
from kar_offline.train.arms import Arm
from kar_offline.train.collaborative import collaborative_vectors
from kar_offline.train.features import EncodedDataset
from kar_offline.train.principal_components import principal_components
from kar_offline.train.samples import Samples
from kar_offline.train.vectors import TextVectors, load_text_vectors
from kar_sidecar.ranking.affinity import AFFINITY_EVENTS, STATISTICS, affinity, affinity_columns, centred

__all__ = ["AffinityInput", "KnowledgeInputs"]

TEXT: Final = "text"
RAW: Final = "raw"
COLLABORATIVE: Final = "cf"
WIDTH: Final = 64
"""Components of a segment; docs/adr/0006 compares widths."""
CROSS_FITS: Final = 5
"""Groups of training users in the cross-fitting of collaborative vectors."""
CHUNK_ROWS: Final = 128
"""Rows whose affinity columns are computed at once."""
STANDARDISATION_ROWS: Final = 8192
"""Training rows that mean and scale of the affinity columns are computed from."""


@dataclass(frozen=True, slots=True)
class AffinityInput:
    """The parts of affinity that serving needs: item vectors, and how the columns are standardised."""

    segments: tuple[tuple[str, int], ...]
    """Name and number of components of each segment of a vector."""
    vectors: Tensor
    """[items, V] float32 by dataset row; a segment is zeros where the item has no such vector."""
    mean: Tensor
    """[F] float32, subtracted from the columns; F is 0 if the model does not read the fixed columns."""
    scale: Tensor
    """[F] float32; the columns are divided by it after the mean is subtracted."""

    @property
    def widths(self) -> list[int]:
        """Components of each segment."""
        return [width for _, width in self.segments]


@dataclass(frozen=True)
class KnowledgeInputs:
    """The knowledge inputs of one arm for one dataset."""

    arm: Arm
    dataset: Dataset
    texts: TextVectors | None = None
    affinity: AffinityInput | None = None
    tables: NDArray[np.float32] | None = None
    """[T, items + 1, V] item vectors. Collaborative segments are cross-fitted, so each group of training users has its
    own table; the last table is `affinity.vectors`. The last row of a table is zeros: row -1 means padding."""
    table_of_user: NDArray[np.int64] | None = None
    """[users], the table that each user's affinity is computed from."""

    @staticmethod
    def for_training(
        arm: Arm, data: EncodedDataset, train: Samples, encodings: Path, *, seed: int
    ) -> "KnowledgeInputs":
        """Compute the inputs of an arm; affinity columns are standardised on training rows.

        Args:
            arm: The recipe.
            data: The dataset.
            train: Training rows.
            encodings: Folder of the encoding stage; only arms with texts read it.
            seed: Seed of shuffled and random texts and of cross-fitting.

        Raises:
            PreconditionError: the texts are not encoded yet.
            IntegrityError: the texts' vectors are corrupt or belong to another dataset.
        """
        dataset = data.dataset
        texts = load_text_vectors(encodings, arm.texts, dataset, seed=seed) if arm.texts else None
        if not (arm.affinity or arm.learned_affinity):
            return KnowledgeInputs(arm, dataset, texts)
        raw = load_text_vectors(encodings, "raw", dataset) if arm.raw_affinity else None
        affinity_texts = texts if arm.text_affinity or arm.learned_affinity else None
        segments, tables, table_of_user = _affinity_tables(arm, dataset, affinity_texts, raw, seed)
        columns = affinity_columns(len(segments)) if arm.affinity else 0
        vectors = torch.from_numpy(tables[-1, :-1].copy())
        not_standardised = AffinityInput(tuple(segments), vectors, torch.zeros(columns), torch.ones(columns))
        inputs = KnowledgeInputs(arm, dataset, texts, not_standardised, tables, table_of_user)
        if not columns:
            return inputs
        values = inputs.affinity_columns(_standardisation_rows(train))
        scale = values.std(0)
        scale = torch.where(scale > 0, scale, torch.ones(columns))
        return replace(inputs, affinity=replace(not_standardised, mean=values.mean(0), scale=scale))

    @staticmethod
    def for_serving(
        arm: Arm, dataset: Dataset, affinity: AffinityInput | None, encodings: Path, *, seed: int
    ) -> "KnowledgeInputs":
        """The inputs of a trained model as serving computes them: all users have one table of item vectors.

        Args:
            arm: The recipe.
            dataset: The dataset.
            affinity: The affinity input of the trained model; None if the model reads no affinity.
            encodings: Folder of the encoding stage; only arms with texts read it.
            seed: The seed that the model was trained with.

        Raises:
            PreconditionError: the texts are not encoded yet.
            IntegrityError: the texts' vectors are corrupt or belong to another dataset.
        """
        texts = load_text_vectors(encodings, arm.texts, dataset, seed=seed) if arm.texts else None
        if affinity is None:
            return KnowledgeInputs(arm, dataset, texts)
        table = np.pad(affinity.vectors.numpy(), ((0, 1), (0, 0)))
        return KnowledgeInputs(arm, dataset, texts, affinity, table[None], np.zeros(len(dataset.users), np.int64))

    def as_served(self) -> "KnowledgeInputs":
        """The same inputs with one table of item vectors for all users, training users included, as in serving."""
        if self.tables is None or self.table_of_user is None:
            return self
        return replace(self, tables=self.tables[-1:], table_of_user=np.zeros_like(self.table_of_user))

    def without_knowledge_of(self, towers: Sequence[Tower]) -> "KnowledgeInputs":
        """The same inputs with the knowledge of some towers removed: no texts, and zeros as items' affinity vectors."""
        texts, affinity, tables = self.texts, self.affinity, self.tables
        if texts and "user" in towers:
            texts = replace(texts, user_present=torch.zeros_like(texts.user_present))
        if texts and "item" in towers:
            texts = replace(texts, item_present=torch.zeros_like(texts.item_present))
        if affinity and tables is not None and "item" in towers:
            affinity = replace(affinity, vectors=torch.zeros_like(affinity.vectors))
            tables = np.zeros_like(tables)
        return replace(self, texts=texts, affinity=affinity, tables=tables)

    def spec(self, base: InputSpec, knowledge_width: int) -> InputSpec:
        """Sizes of the model's inputs.

        Args:
            base: Sizes without knowledge.
            knowledge_width: Components of a knowledge vector, the adaptor's output.
        """
        reads_vectors = self.arm.learned_affinity and self.affinity is not None
        return replace(
            base,
            affinity=len(self.affinity.mean) if self.affinity else 0,
            vector=self.affinity.vectors.shape[1] if reads_vectors and self.affinity else 0,
            user_knowledge=knowledge_width if "user" in self.arm.towers else 0,
            item_knowledge=knowledge_width if "item" in self.arm.towers else 0,
        )

    def encodings(self, tower: Tower) -> tuple[Tensor, Tensor]:
        """Text encodings [entities, D] of one tower, and which entities have a text [entities] bool.

        Raises:
            ValueError: the arm has no texts.
        """
        if self.texts is None:
            raise ValueError("this arm has no texts")
        return self.texts.tower(tower)

    def affinity_columns(self, samples: Samples) -> Tensor:
        """Standardised affinity columns [S, F]; F is 0 for an arm without fixed columns."""
        if self.affinity is None or not len(self.affinity.mean):
            return torch.zeros(len(samples), 0)
        parts = [self._raw_columns(samples, rows) for rows in _chunks(len(samples), samples.list_length)]
        raw = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, len(self.affinity.mean))
        return (raw - self.affinity.mean) / self.affinity.scale

    def _raw_columns(self, samples: Samples, rows: slice) -> NDArray[np.float32]:
        """Affinity columns of some rows, not standardised."""
        if self.affinity is None or self.tables is None or self.table_of_user is None:
            raise ValueError("this arm has no affinity")
        length = samples.list_length
        items, ratings, real = self._rated_items(samples.event[rows][::length].numpy())  # [lists, H] each
        table = self.table_of_user[samples.user[rows][::length].numpy()][:, None]  # [lists, 1]
        candidates = samples.item[rows].numpy().reshape(-1, length)  # [lists, length]
        vectors, history = self.tables[table, candidates], self.tables[table, items]
        columns = affinity(vectors, history, ratings, real, self.affinity.widths)  # [lists, length, F]
        return columns.reshape(-1, columns.shape[2])

    def _rated_items(self, events: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.float32], NDArray[np.bool_]]:
        """Item rows and ratings of the histories before `events` [n, H] each, and a mask [n, H], False at padding."""
        items, ratings = self.dataset.history_windows(events, AFFINITY_EVENTS)
        return items, ratings, items >= 0

    @cached_property
    def missing_item_columns(self) -> Tensor:
        """Standardised columns [F] of an item without vectors; NaN for columns that do not depend on the item."""
        if self.affinity is None:
            return torch.zeros(0)
        columns = -self.affinity.mean / self.affinity.scale
        columns[: len(STATISTICS)] = torch.nan
        return columns

    def affinity_vectors(self, samples: Samples, rows: Tensor) -> dict[str, Tensor]:
        """The inputs of learned affinity by name; none for other arms.

        Args:
            samples: All rows.
            rows: Row numbers [B]; the rows of a list are side by side.
        """
        if not self.arm.learned_affinity or self.tables is None or self.table_of_user is None:
            return {}
        first_rows = rows[:: samples.list_length]
        items, ratings, real = self._rated_items(samples.event[first_rows].numpy())  # [lists, H] each
        table = self.table_of_user[samples.user[first_rows].numpy()][:, None]  # [lists, 1]
        table_of_row = np.repeat(table[:, 0], samples.list_length)  # [B]
        return {
            "item_vector": torch.from_numpy(self.tables[table_of_row, samples.item[rows].numpy()]),
            "history_vector": torch.from_numpy(self.tables[table, items]),
            "history_weight": torch.from_numpy(centred(ratings, real)),
        }


def _affinity_tables(
    arm: Arm, dataset: Dataset, texts: TextVectors | None, raw: TextVectors | None, seed: int
) -> tuple[list[tuple[str, int]], NDArray[np.float32], NDArray[np.int64]]:
    """Segments, tables [T, items + 1, V] and table of each user [users], as in `KnowledgeInputs`."""
    segments: list[tuple[str, int]] = []
    parts: list[NDArray[np.float32]] = []
    table_of_user = np.zeros(len(dataset.users), np.int64)
    for name, source in ((TEXT, texts), (RAW, raw)):
        if source:
            segments.append((name, WIDTH))
            parts.append(principal_components(source.item, source.item_present, WIDTH).numpy()[None])
    if arm.collaborative_affinity:
        collaborative = collaborative_vectors(dataset, dim=WIDTH, folds=CROSS_FITS, seed=seed)
        segments.append((COLLABORATIVE, WIDTH))
        parts.append(collaborative.tables)
        table_of_user = collaborative.table_of_user
    table_count = max((len(part) for part in parts), default=1)
    repeated = [np.broadcast_to(part, (table_count, *part.shape[1:])) for part in parts]
    tables = np.concatenate([np.zeros((table_count, len(dataset.items), 0), np.float32), *repeated], 2)
    return segments, np.pad(tables, ((0, 0), (0, 1), (0, 0))), table_of_user


def _standardisation_rows(samples: Samples) -> Samples:
    """About `STANDARDISATION_ROWS` rows, evenly spread over all lists."""
    length = samples.list_length
    stride = max(1, len(samples) // STANDARDISATION_ROWS)
    rows = (torch.arange(0, len(samples) // length, stride).unsqueeze(1) * length + torch.arange(length)).flatten()
    return samples.rows(rows)


def _chunks(rows: int, list_length: int) -> list[slice]:
    """Slices of about `CHUNK_ROWS` rows, whole lists each."""
    size = max(1, CHUNK_ROWS // list_length) * list_length
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
