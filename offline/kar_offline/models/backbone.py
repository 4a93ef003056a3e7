"""Owns what every model is: embeddings of users, candidates and histories, knowledge affinity, the way to a score."""

from typing import Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_offline.models.inputs import REQUEST_OF_ROW, Inputs, InputSpec
from kar_offline.models.layers import ItemEmbedding, MultiFieldEmbedding, RatingEmbedding
from kar_sidecar.features import PADDING
from kar_sidecar.scoring import AFFINITY, KNOWLEDGE_INPUTS

__all__ = ["Backbone", "FieldBackbone", "LearnedAffinity", "MakeBackbone"]

AFFINITY_NOISE: Final = 0.3
"""Standard deviation of what training adds to standardised affinities, so that the network does not lean on one."""


class LearnedAffinity(nn.Module):
    """Knowledge affinity with learned similarities: a candidate attends to rated items, one head a column.

        a_jh = softmax_h(exp(t_j) <A_j v, A_j v_h>)      v, v_h: affinity vectors of candidate and rated item
        column j = sum_h a_jh w_h                         w_h: rating less the user's mean

    A_j starts as a random projection that keeps inner products on average, t_j at 1 / 0.1.
    """

    def __init__(self, vector: int, *, heads: int = 4, width: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(vector, heads * width, bias=False)
        nn.init.normal_(self.project.weight, std=width**-0.5)
        self.log_scale = nn.Parameter(torch.full((heads,), 10.0).log())

    def forward(self, item: Tensor, history: Tensor, weight: Tensor) -> Tensor:
        """Columns [N, heads] of candidates `item` [N, V], rated items `history` [N, H, V] and `weight` [N, H]."""
        query = self.project(item).unflatten(1, (self.heads, -1)) * self.log_scale.exp().unsqueeze(1)  # [N, J, a]
        key = self.project(history).unflatten(2, (self.heads, -1))  # [N, H, J, a]
        similarity = torch.einsum("nja,nhja->njh", query, key)
        known = history.abs().sum(2) > 0  # [N, H]
        attention = torch.softmax(similarity.masked_fill(~known.unsqueeze(1), -1e9), 2)
        return torch.einsum("njh,nh->nj", attention, weight)  # the weights of padding are 0


class Backbone(nn.Module):
    """Base of the models: embeds users, candidates and histories; a subclass turns them into log-odds.

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
        self.learned = LearnedAffinity(spec.vector) if spec.vector else None
        self.affinity_width = spec.affinity + (self.learned.heads if self.learned else 0)
        """Columns that `affinity` gives."""
        if self.affinity_width:
            self.direct = nn.Linear(self.affinity_width, 1, bias=False)
            nn.init.zeros_(self.direct.weight)

    @property
    def event_width(self) -> int:
        """Width of a history event: item and rating."""
        return self.items.width + self.ratings.weight.shape[1]

    @property
    def user_width(self) -> int:
        """Width of `embed_user`."""
        return self.user_fields.width + self.spec.user_numbers

    @property
    def candidate_width(self) -> int:
        """Width of `embed_candidate`."""
        return self.items.width + self.spec.item_numbers

    @property
    def knowledge_width(self) -> int:
        """Width of `knowledge`."""
        return self.spec.user_knowledge + self.spec.item_knowledge

    @property
    def flat_width(self) -> int:
        """Width of `flat`."""
        entities = self.user_width + self.event_width + self.candidate_width
        return entities + self.knowledge_width + self.affinity_width

    def embed_user(self, inputs: Inputs) -> Tensor:
        """Fields and numbers of the users [R, user_width]."""
        numbers = inputs["user_numeric"][:, : self.spec.user_numbers]
        return torch.cat([self.user_fields(inputs["user_categorical"]), numbers], 1)

    def embed_candidate(self, inputs: Inputs) -> Tensor:
        """Id, fields and numbers of the candidates [N, candidate_width]."""
        numbers = inputs["item_numeric"][:, : self.spec.item_numbers]
        return torch.cat([self.items(inputs["item_index"], inputs["item_categorical"]), numbers], 1)

    def mean_event(self, inputs: Inputs) -> Tensor:
        """Mean over the events of each history [R, event_width]: item, then rating; zeros for an empty one."""
        item, rating = inputs["history_item"], inputs["history_rating"]
        events = (item != PADDING).sum(1, keepdim=True).clamp(min=1)
        table = self.items.table()
        # The bag never holds all events at once; ONNX knows no bag.
        exporting = torch.onnx.is_in_onnx_export()
        items = F.embedding(item, table).sum(1) if exporting else F.embedding_bag(item, table, mode="sum")
        buckets = self.ratings.table()
        blank = table.new_zeros(rating.shape[0], buckets.shape[0])
        counts = blank.scatter_add(1, rating, torch.ones_like(rating).to(table))
        return torch.cat([items, counts @ buckets], 1) / events

    def knowledge(self, inputs: Inputs) -> Tensor:
        """Knowledge vectors per candidate [N, knowledge_width]: the user's, the item's, where the spec has them."""
        user, item = KNOWLEDGE_INPUTS
        parts = [self.spread(inputs, inputs[user])] if self.spec.user_knowledge else []
        parts += [inputs[item]] if self.spec.item_knowledge else []
        return torch.cat(parts, 1) if parts else inputs["item_numeric"][:, :0]

    def affinity(self, inputs: Inputs) -> Tensor:
        """Knowledge affinity per candidate [N, affinity_width]: the fixed columns, then the learned ones.

        Inside `network` these are ready, noise included; it may be 0 columns wide.
        """
        return inputs.get(AFFINITY, inputs["item_numeric"][:, :0])

    def flat(self, inputs: Inputs) -> Tensor:
        """Everything side by side [N, flat_width]: user, mean event, candidate, knowledge, affinity."""
        request = self.spread(inputs, torch.cat([self.embed_user(inputs), self.mean_event(inputs)], 1))
        return torch.cat([request, self.embed_candidate(inputs), self.knowledge(inputs), self.affinity(inputs)], 1)

    @staticmethod
    def spread(inputs: Inputs, of_requests: Tensor) -> Tensor:
        """What belongs to requests [R, ...], once a candidate [N, ...].

        Training leaves `request_of_row` out where every candidate is a request of its own.
        """
        return of_requests[inputs[REQUEST_OF_ROW]] if REQUEST_OF_ROW in inputs else of_requests

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N] before the affinities' direct part; a candidate's depends on itself and its request only."""
        raise NotImplementedError

    def logits(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]: the network's, and affinities weighted linearly."""
        if not self.affinity_width:
            return self.network(inputs)
        columns = self._affinity(inputs)
        return self.network({**inputs, AFFINITY: columns}) + self.direct(columns).squeeze(1)

    def _affinity(self, inputs: Inputs) -> Tensor:
        columns = self.affinity(inputs)
        if self.training:
            columns = columns + AFFINITY_NOISE * torch.randn_like(columns)
        if self.learned is None:
            return columns
        history, weight = (self.spread(inputs, inputs[name]) for name in ("history_vector", "history_weight"))
        return torch.cat([columns, self.learned(inputs["item_vector"], history, weight)], 1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss [] that training minimises; `labels` [N] float of 0 and 1."""
        return F.binary_cross_entropy_with_logits(logits, labels)

    def forward(self, inputs: Inputs) -> Tensor:
        """Probabilities [N] of the tensors that `kar_offline.models.inputs` lists."""
        return torch.sigmoid(self.logits(inputs))


class FieldBackbone(Backbone):
    """Base of the models that see their input as M fields of one width d (also `flat`, if they wish).

    Fields: the user's categories; the mean event's item id, item categories and rating; the candidate's id and
    categories; then, each through a linear layer to d, the user's numbers, the candidate's numbers, the user's
    knowledge, the item's knowledge and the affinities, where the spec has them.
    """

    def __init__(self, spec: InputSpec, item_categories: Tensor, *, embedding: int) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.embedding = embedding
        sizes = [spec.user_numbers, spec.item_numbers, spec.user_knowledge, spec.item_knowledge, self.affinity_width]
        self.dense_sizes = sizes
        self.dense = nn.ModuleList(nn.Linear(size, embedding) if size else nn.Identity() for size in sizes)
        embedded = len(spec.user_fields) + 2 * (1 + len(spec.item_fields)) + 1
        self.field_count = embedded + sum(size > 0 for size in sizes)
        """Fields M."""

    def fields(self, inputs: Inputs) -> Tensor:
        """All fields [N, M, d]."""
        user = torch.cat([self.user_fields(inputs["user_categorical"]), self.mean_event(inputs)], 1)
        user_knowledge, item_knowledge = self.knowledge(inputs).split(self.dense_sizes[2:4], 1)
        dense = (
            self.spread(inputs, inputs["user_numeric"][:, : self.spec.user_numbers]),
            inputs["item_numeric"][:, : self.spec.item_numbers],
            user_knowledge,
            item_knowledge,
            self.affinity(inputs),
        )
        projected = [layer(values) for layer, values in zip(self.dense, dense, strict=True)]
        item = self.items(inputs["item_index"], inputs["item_categorical"])
        fields = torch.cat([self.spread(inputs, user), item, *projected], 1)
        return fields.unflatten(1, (self.field_count, self.embedding))


class MakeBackbone(Protocol):
    """How the registry calls a model's class."""

    def __call__(self, spec: InputSpec, item_categories: Tensor) -> Backbone:
        """A freshly initialised model."""
        ...
