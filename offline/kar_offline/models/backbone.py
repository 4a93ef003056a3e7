"""Owns what every backbone is: embeddings of users, candidates and histories, and the way to a score."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kar_offline.models.inputs import REQUEST_OF_ROW, Inputs, InputSpec
from kar_offline.models.layers import ItemEmbedding, MultiFieldEmbedding, RatingEmbedding

__all__ = ["Backbone", "MakeBackbone"]


class Backbone(nn.Module):
    """Base of the backbones: embeds users, candidates and histories; a subclass turns them into logits.

    Args:
        spec: Sizes of the inputs.
        item_categories: [items, Ic] int64, categories of every item index, so that history events have them too.
        embedding: Components d of an embedding.
    """

    def __init__(self, spec: InputSpec, item_categories: Tensor, *, embedding: int) -> None:
        super().__init__()
        self.spec = spec
        self.user_fields = MultiFieldEmbedding(spec.user_fields, embedding)
        self.items = ItemEmbedding(spec.items, spec.item_fields, item_categories, embedding)
        self.ratings = RatingEmbedding(embedding)
        self.event_width = self.items.width + embedding

    @property
    def user_width(self) -> int:
        """Width of `embed_user`."""
        return self.user_fields.width + self.spec.user_numbers

    @property
    def candidate_width(self) -> int:
        """Width of `embed_candidate`."""
        return self.items.width + self.spec.item_numbers

    def embed_user(self, inputs: Inputs) -> Tensor:
        """Fields and numbers of the users [R, user_width]."""
        numbers = inputs["user_numeric"][:, : self.spec.user_numbers]
        return torch.cat([self.user_fields(inputs["user_categorical"]), numbers], 1)

    def embed_candidate(self, inputs: Inputs) -> Tensor:
        """Id, fields and numbers of the candidates [N, candidate_width]."""
        numbers = inputs["item_numeric"][:, : self.spec.item_numbers]
        return torch.cat([self.items(inputs["item_index"], inputs["item_categorical"]), numbers], 1)

    def knowledge(self, inputs: Inputs) -> Sequence[Tensor]:
        """Knowledge vectors per candidate: two of [N, K], user's and item's, or none."""
        if not self.spec.knowledge:
            return ()
        return self.spread(inputs, inputs["user_knowledge"]), inputs["item_knowledge"]

    @staticmethod
    def spread(inputs: Inputs, of_requests: Tensor) -> Tensor:
        """What belongs to requests [R, ...], once a candidate [N, ...].

        Training leaves `request_of_row` out: there every candidate is a request of its own.
        """
        return of_requests[inputs[REQUEST_OF_ROW]] if REQUEST_OF_ROW in inputs else of_requests

    def logits(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]; a candidate's depends on itself and its request only (in evaluation mode)."""
        raise NotImplementedError

    def forward(self, inputs: Inputs) -> Tensor:
        """Probabilities [N] of the tensors that `kar_offline.models.inputs` lists."""
        return torch.sigmoid(self.logits(inputs))


class MakeBackbone(Protocol):
    """How the registry calls a backbone's class."""

    def __call__(self, spec: InputSpec, item_categories: Tensor) -> Backbone:
        """A freshly initialised backbone."""
        ...
