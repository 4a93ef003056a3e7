"""Owns what an arm gives a model beside the logs: text encodings, affinity columns, affinity vectors."""

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
from kar_offline.train.features import EncodedDataset, Samples
from kar_offline.train.vectors import TextVectors, load_text_vectors
from kar_sidecar.ranking.affinity import AFFINITY_EVENTS, STATISTICS, affinity, affinity_columns, centred

__all__ = ["AffinityInput", "Components", "KnowledgeInputs", "principal"]

TEXT: Final = "text"
RAW: Final = "raw"
COLLABORATIVE: Final = "cf"
WIDTH: Final = 64
"""Components of a segment; docs/adr/0006 has what more of them are worth."""
CROSS_FITS: Final = 5
CHUNK_ROWS: Final = 128
ENOUGH: Final = 8192


def principal(vectors: Tensor, present: Tensor, width: int) -> Tensor:
    """The first `width` principal components [n, width] of centred unit vectors, of unit length; zeros where absent.

    Args:
        vectors: [n, D] float32.
        present: [n] bool; the others neither count nor get a vector.
        width: At most D; fewer than `width` rows or components leave zeros at the end.
    """
    out = torch.zeros(len(vectors), width)
    if len(known := vectors[present]):
        out[present] = Components.of(known, width).project(known)
    return out


@dataclass(frozen=True, slots=True)
class Components:
    """Principal components of some unit vectors, for vectors of the same encoder."""

    mean: Tensor
    """[D] float64"""
    axes: Tensor
    """[D, width] float64; fewer columns where D is less."""
    width: int

    @staticmethod
    def of(vectors: Tensor, width: int) -> "Components":
        """The first `width` components of vectors [n, D], n at least 1."""
        mean = vectors.double().mean(0)
        centred_rows = torch.nn.functional.normalize(vectors.double() - mean)
        _, axes = torch.linalg.eigh(centred_rows.T @ centred_rows)
        axes = axes.flip(1)[:, :width]
        # An eigenvector's sign is arbitrary: fix it, so that machines agree.
        return Components(mean, axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign(), width)

    def project(self, vectors: Tensor) -> Tensor:
        """Vectors [n, D] in these components [n, width] float32, of unit length."""
        projected = torch.nn.functional.normalize(
            torch.nn.functional.normalize(vectors.double() - self.mean) @ self.axes
        )
        return torch.nn.functional.pad(projected.float(), (0, self.width - projected.shape[1]))


@dataclass(frozen=True, slots=True)
class AffinityInput:
    """Item vectors that affinities are computed from, and how their columns are standardised: what serving needs."""

    segments: tuple[tuple[str, int], ...]
    """Name and components of each segment of a vector."""
    vectors: Tensor
    """[items, V] float32 by dataset row; a segment is zeros where an item has none."""
    mean: Tensor
    """[F] float32, subtracted first; F is 0 where the fixed columns are no input."""
    scale: Tensor
    """[F] float32, divided by second."""

    @property
    def widths(self) -> list[int]:
        """Components of each segment."""
        return [width for _, width in self.segments]


@dataclass(frozen=True)
class KnowledgeInputs:
    """What one arm gives for one dataset."""

    arm: Arm
    dataset: Dataset
    texts: TextVectors | None = None
    affinity: AffinityInput | None = None
    tables: NDArray[np.float32] | None = None
    """[T, items + 1, V]: collaborative segments are cross-fitted, so training users have vectors of their own; the last
    table is `affinity.vectors`. The last row of each is zeros: that of no item, number -1."""
    table_of_user: NDArray[np.int64] | None = None
    """[users] rows of `tables`."""

    @staticmethod
    def of(arm: Arm, data: EncodedDataset, train: Samples, encodings: Path, *, seed: int) -> "KnowledgeInputs":
        """Collect what `arm` gives; columns are standardised on the rows of `train`.

        Args:
            arm: The recipe.
            data: The dataset.
            train: Training rows.
            encodings: Folder of the encoding stage; read by arms with texts only.
            seed: Of permuted and random texts and of cross-fitting.

        Raises:
            PreconditionError: the texts are not encoded yet.
            IntegrityError: their vectors are corrupt or of another dataset.
        """
        dataset = data.dataset
        texts = load_text_vectors(encodings, arm.texts, dataset, seed=seed) if arm.texts else None
        if not (arm.affinity or arm.learned_affinity):
            return KnowledgeInputs(arm, dataset, texts)
        segments: list[tuple[str, int]] = []
        parts: list[NDArray[np.float32]] = []
        tables_of_user = np.zeros(len(dataset.users), np.int64)
        own = texts if arm.text_affinity or arm.learned_affinity else None
        beside = load_text_vectors(encodings, "raw", dataset) if arm.raw_affinity else None
        for name, source in ((TEXT, own), (RAW, beside)):
            if source:
                segments.append((name, WIDTH))
                parts.append(principal(source.item, source.item_present, WIDTH).numpy()[None])
        if arm.collaborative_affinity:
            found = collaborative_vectors(dataset, dim=WIDTH, folds=CROSS_FITS, seed=seed)
            segments.append((COLLABORATIVE, WIDTH))
            parts.append(found.tables)
            tables_of_user = found.table_of_user
        count = max((len(part) for part in parts), default=1)
        shared = [np.broadcast_to(part, (count, *part.shape[1:])) for part in parts]
        tables = np.concatenate([np.zeros((count, len(dataset.items), 0), np.float32), *shared], 2)
        tables = np.pad(tables, ((0, 0), (0, 1), (0, 0)))
        columns = affinity_columns(len(segments)) if arm.affinity else 0
        blank = AffinityInput(
            tuple(segments), torch.from_numpy(tables[-1, :-1].copy()), torch.zeros(columns), torch.ones(columns)
        )
        given = KnowledgeInputs(arm, dataset, texts, blank, tables, tables_of_user)
        if not columns:
            return given
        raw = given.columns(_some(train))
        scale = raw.std(0)
        standard = replace(blank, mean=raw.mean(0), scale=torch.where(scale > 0, scale, torch.ones(columns)))
        return replace(given, affinity=standard)

    @staticmethod
    def served(
        arm: Arm, dataset: Dataset, affinity: AffinityInput | None, encodings: Path, *, seed: int
    ) -> "KnowledgeInputs":
        """What serving gives, for users that took no part in training: one table of vectors for all.

        `affinity` is that of the trained model, `seed` the one that it was trained with. Raises as `of` does.
        """
        texts = load_text_vectors(encodings, arm.texts, dataset, seed=seed) if arm.texts else None
        if affinity is None:
            return KnowledgeInputs(arm, dataset, texts)
        users = np.zeros(len(dataset.users), np.int64)
        return KnowledgeInputs(
            arm, dataset, texts, affinity, np.pad(affinity.vectors.numpy(), ((0, 1), (0, 0)))[None], users
        )

    def as_served(self) -> "KnowledgeInputs":
        """The same with one table of vectors for all, training users included, as in serving."""
        if self.tables is None or self.table_of_user is None:
            return self
        return replace(self, tables=self.tables[-1:], table_of_user=np.zeros_like(self.table_of_user))

    def spec(self, base: InputSpec, knowledge: int) -> InputSpec:
        """Sizes of the model's inputs; `knowledge` components come out of the adaptor."""
        learned = self.arm.learned_affinity and self.affinity is not None
        return replace(
            base,
            affinity=len(self.affinity.mean) if self.affinity else 0,
            vector=self.affinity.vectors.shape[1] if learned and self.affinity else 0,
            user_knowledge=knowledge if "user" in self.arm.towers else 0,
            item_knowledge=knowledge if "item" in self.arm.towers else 0,
        )

    def known(self, tower: Tower) -> tuple[Tensor, Tensor]:
        """Encodings [entities, D] and their presence of one tower.

        Raises:
            ValueError: the arm has no texts.
        """
        if self.texts is None:
            raise ValueError("this arm has no texts")
        return self.texts.tower(tower)

    def columns(self, samples: Samples) -> Tensor:
        """Standardised affinity columns [S, F] of rows; F is 0 for an arm without."""
        if self.affinity is None or not len(self.affinity.mean):
            return torch.zeros(len(samples), 0)
        parts = [self._raw(samples, at) for at in _chunks(len(samples), samples.list_length)]
        raw = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, len(self.affinity.mean))
        return (raw - self.affinity.mean) / self.affinity.scale

    def _raw(self, samples: Samples, at: slice) -> NDArray[np.float32]:
        if self.affinity is None or self.tables is None or self.table_of_user is None:
            raise ValueError("this arm has no affinity")
        step = samples.list_length
        items, ratings, seen = self._window(samples.event[at][::step].numpy())
        table = self.table_of_user[samples.user[at][::step].numpy()][:, None]
        candidates = samples.item[at].numpy().reshape(-1, step)
        vectors, history = self.tables[table, candidates], self.tables[table, items]
        found = affinity(vectors, history, ratings, seen, self.affinity.widths)
        return found.reshape(-1, found.shape[2])

    def _window(self, events: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.float32], NDArray[np.bool_]]:
        items, ratings = self.dataset.history_windows(events, AFFINITY_EVENTS)
        return items, ratings, items >= 0

    @cached_property
    def absent(self) -> Tensor:
        """Standardised columns [F] of an item without vectors; NaN where they do not depend on it."""
        if self.affinity is None:
            return torch.zeros(0)
        columns = -self.affinity.mean / self.affinity.scale
        columns[: len(STATISTICS)] = torch.nan
        return columns

    def vectors(self, samples: Samples, at: Tensor) -> dict[str, Tensor]:
        """The inputs of learned affinity for rows numbered `at` [B], whole lists side by side; else nothing."""
        if not self.arm.learned_affinity or self.tables is None or self.table_of_user is None:
            return {}
        lists = at[:: samples.list_length]
        items, ratings, seen = self._window(samples.event[lists].numpy())
        table = self.table_of_user[samples.user[lists].numpy()][:, None]
        own = np.repeat(table[:, 0], samples.list_length)
        return {
            "item_vector": torch.from_numpy(self.tables[own, samples.item[at].numpy()]),
            "history_vector": torch.from_numpy(self.tables[table, items]),
            "history_weight": torch.from_numpy(centred(ratings, seen)),
        }

    def without(self, kinds: Sequence[Tower]) -> "KnowledgeInputs":
        """The same arm when nothing is known of users, of items or of both: neutral vectors, no similarities."""
        texts, affinity, tables = self.texts, self.affinity, self.tables
        if texts and "user" in kinds:
            texts = replace(texts, user_present=torch.zeros_like(texts.user_present))
        if texts and "item" in kinds:
            texts = replace(texts, item_present=torch.zeros_like(texts.item_present))
        if affinity and tables is not None and "item" in kinds:
            affinity = replace(affinity, vectors=torch.zeros_like(affinity.vectors))
            tables = np.zeros_like(tables)
        return replace(self, texts=texts, affinity=affinity, tables=tables)


def _some(samples: Samples) -> Samples:
    """About `ENOUGH` rows, evenly spread over all: enough for a mean and a standard deviation."""
    step = samples.list_length
    stride = max(1, len(samples) // ENOUGH)
    at = (torch.arange(0, len(samples) // step, stride).unsqueeze(1) * step + torch.arange(step)).flatten()
    return samples.rows(at)


def _chunks(rows: int, step: int) -> list[slice]:
    size = max(1, CHUNK_ROWS // step) * step
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
