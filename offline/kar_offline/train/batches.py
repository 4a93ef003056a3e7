"""Owns the way from rows to batches: one split of one dataset as one arm's model reads it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kar_kernels import Tower
from kar_offline.models import Encodings
from kar_offline.train.features import EncodedDataset, Samples
from kar_offline.train.knowledge_inputs import KnowledgeInputs
from kar_sidecar.scoring import AFFINITY

__all__ = ["Batch", "BatchFeed"]


@dataclass(frozen=True, slots=True)
class Batch:
    """What `CTRModel` reads, and the labels [N]."""

    inputs: dict[str, Tensor]
    encodings: dict[Tower, Encodings]
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        encodings = {
            tower: Encodings(*(tensor.to(device, non_blocking=True) for tensor in part))
            for tower, part in self.encodings.items()
        }
        return Batch(inputs, encodings, self.labels.to(device))


@dataclass(frozen=True, slots=True)
class BatchFeed:
    """Rows of one split with what their arm gives; everything that training does not change is computed once."""

    data: EncodedDataset
    samples: Samples
    given: KnowledgeInputs
    affinity: Tensor
    """[S, F] float32, standardised."""

    @staticmethod
    def of(data: EncodedDataset, samples: Samples, given: KnowledgeInputs) -> "BatchFeed":
        """Compute the affinities of `samples`."""
        return BatchFeed(data, samples, given, given.columns(samples))

    def __len__(self) -> int:
        """Number of rows S."""
        return len(self.samples)

    def shuffled(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        """Row numbers of batches of at most `batch` rows (whole lists, at least one) in random order."""
        step = self.samples.list_length
        lists = torch.randperm(len(self) // step, generator=generator).split(max(1, batch // step))
        return [(part.unsqueeze(1) * step + torch.arange(step)).flatten() for part in lists]

    def inputs(self, at: Tensor) -> dict[str, Tensor]:
        """Inputs of rows numbered `at` [B] but for knowledge vectors."""
        inputs = self.data.inputs(self.samples, at) | self.given.vectors(self.samples, at)
        return inputs | ({AFFINITY: self.affinity[at]} if self.affinity.shape[1] else {})

    def batch(self, at: Tensor, dropout: float) -> Batch:
        """Rows numbered `at` [B] for training, each distinct user and item once.

        With probability `dropout` an entity of the batch is one of which nothing is known; likewise all that belongs
        to one request, so that the model learns to score without knowledge.
        """
        step = self.samples.list_length
        request = torch.rand(len(at) // step) < dropout
        item, item_row = torch.unique(self.samples.item[at], return_inverse=True)
        unknown = (torch.rand(len(item)) < dropout)[item_row] | request.repeat_interleave(step)
        inputs = self.inputs(at)
        if AFFINITY in inputs:
            absent = torch.where(self.given.absent.isnan(), inputs[AFFINITY], self.given.absent)
            inputs[AFFINITY] = torch.where(unknown.unsqueeze(1), absent, inputs[AFFINITY])
        if "item_vector" in inputs:
            inputs["item_vector"] = inputs["item_vector"].masked_fill(unknown.unsqueeze(1), 0)
        encodings: dict[Tower, Encodings] = {}
        if "item" in self.given.arm.towers:
            encodings["item"] = self._encodings("item", item, item_row, unknown)
        if "user" in self.given.arm.towers:
            user, user_row = torch.unique(self.samples.user[at[::step]], return_inverse=True)
            forgotten = (torch.rand(len(user)) < dropout)[user_row] | request
            encodings["user"] = self._encodings("user", user, user_row, forgotten)
        return Batch(inputs, encodings, self.samples.label[at])

    def _encodings(self, tower: Tower, entity: Tensor, row: Tensor, unknown: Tensor) -> Encodings:
        vectors, present = self.given.known(tower)
        # One more entity, of which nothing is known, stands in for those that are dropped.
        encoding = torch.cat([vectors[entity], vectors.new_zeros(1, vectors.shape[1])])
        known = torch.cat([present[entity], present.new_zeros(1)])
        return Encodings(encoding, known, row.masked_fill(unknown, len(entity)))

    def in_order(self, batch: int) -> Iterator[Tensor]:
        """Row numbers of all rows in order, at most `batch` (whole lists) at once."""
        step = self.samples.list_length
        yield from torch.arange(len(self)).split(max(1, batch // step) * step)
