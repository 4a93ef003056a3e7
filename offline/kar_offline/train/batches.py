"""Owns batches: the inputs, text encodings and labels of some rows of one split, for one arm."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kar_kernels import Tower
from kar_offline.models import Encodings
from kar_offline.models.inputs import REQUEST_OF_ROW
from kar_offline.train.features import EncodedDataset
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_offline.train.samples import Samples
from kar_sidecar.scoring import AFFINITY

__all__ = ["Batch", "Batches"]


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of a `CTRModel` and the labels of B rows."""

    inputs: dict[str, Tensor]
    encodings: dict[Tower, Encodings]
    labels: Tensor
    """[B] float32."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        encodings = {
            tower: Encodings(*(tensor.to(device, non_blocking=True) for tensor in part))
            for tower, part in self.encodings.items()
        }
        return Batch(inputs, encodings, self.labels.to(device))


@dataclass(frozen=True)
class Batches:
    """All rows of one split with the knowledge inputs of one arm, ready to be cut into batches.

    The rows of a list always stay together. The affinity columns do not change during training: they are computed once,
    at construction.
    """

    data: EncodedDataset
    samples: Samples
    knowledge_inputs: KnowledgeInputs
    affinity: Tensor = field(init=False)
    """[S, F] float32, standardised."""

    def __post_init__(self) -> None:
        """Compute the affinity columns."""
        object.__setattr__(self, "affinity", self.knowledge_inputs.affinity_columns(self.samples))

    def __len__(self) -> int:
        """Number of rows S."""
        return len(self.samples)

    def in_random_order(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        """Row numbers of each batch of at most `batch` rows, and at least one list, over all lists in random order."""
        length = self.samples.list_length
        lists = torch.randperm(len(self) // length, generator=generator).split(max(1, batch // length))
        return [(numbers.unsqueeze(1) * length + torch.arange(length)).flatten() for numbers in lists]

    def in_order(self, batch: int) -> Iterator[Tensor]:
        """Row numbers of each batch of at most `batch` rows, and at least one list, in the order of the rows."""
        length = self.samples.list_length
        yield from torch.arange(len(self)).split(max(1, batch // length) * length)

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """Inputs of the rows numbered `rows` [B], without knowledge vectors.

        Every list is one request. Where rows are independent, every row is a request of its own and `request_of_row` is
        left out.
        """
        length = self.samples.list_length
        first_rows = rows[::length]
        entity_rows = {"user": self.samples.user[first_rows], "item": self.samples.item[rows]}
        inputs = {name: column[entity_rows[name.split("_")[0]]] for name, column in self.data.columns.items()}
        inputs["history_item"] = self.samples.history_item[first_rows]
        inputs["history_rating"] = self.samples.history_rating[first_rows]
        if length > 1:
            inputs[REQUEST_OF_ROW] = torch.arange(len(first_rows)).repeat_interleave(length)
        inputs |= self.knowledge_inputs.affinity_vectors(self.samples, rows)
        if self.affinity.shape[1]:
            inputs[AFFINITY] = self.affinity[rows]
        return inputs

    def batch(self, rows: Tensor, dropout: float) -> Batch:
        """A training batch, in which the model also learns to score without knowledge.

        Dropped knowledge looks like missing knowledge. With probability `dropout` each distinct user and each distinct
        item loses its knowledge, and with the same probability a request loses all of its knowledge.

        Args:
            rows: Row numbers [B].
            dropout: From 0 to 1.
        """
        length = self.samples.list_length
        request_dropped = torch.rand(len(rows) // length) < dropout  # [requests]
        item, item_row = torch.unique(self.samples.item[rows], return_inverse=True)  # [items], [B]
        item_dropped = (torch.rand(len(item)) < dropout)[item_row] | request_dropped.repeat_interleave(length)  # [B]
        inputs = self.inputs(rows)
        if AFFINITY in inputs:
            missing = self.knowledge_inputs.missing_item_columns
            missing = torch.where(missing.isnan(), inputs[AFFINITY], missing)  # [B, F]
            inputs[AFFINITY] = torch.where(item_dropped.unsqueeze(1), missing, inputs[AFFINITY])
        if "item_vector" in inputs:
            inputs["item_vector"] = inputs["item_vector"].masked_fill(item_dropped.unsqueeze(1), 0)
        encodings: dict[Tower, Encodings] = {}
        if "item" in self.knowledge_inputs.arm.towers:
            encodings["item"] = self._encodings("item", item, item_row, item_dropped)
        if "user" in self.knowledge_inputs.arm.towers:
            user, user_row = torch.unique(self.samples.user[rows[::length]], return_inverse=True)
            user_dropped = (torch.rand(len(user)) < dropout)[user_row] | request_dropped
            encodings["user"] = self._encodings("user", user, user_row, user_dropped)
        return Batch(inputs, encodings, self.samples.label[rows])

    def _encodings(self, tower: Tower, entity: Tensor, row: Tensor, dropped: Tensor) -> Encodings:
        """Encodings of the distinct entities of a batch; dropped rows point to one more entity without a text."""
        vectors, present = self.knowledge_inputs.encodings(tower)
        encoding = torch.cat([vectors[entity], vectors.new_zeros(1, vectors.shape[1])])
        present = torch.cat([present[entity], present.new_zeros(1)])
        return Encodings(encoding, present, row.masked_fill(dropped, len(entity)))
