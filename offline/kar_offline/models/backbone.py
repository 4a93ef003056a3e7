"""Owns the base classes of the backbones: embeddings of user, candidate and history, the affinity, the log-odds.

    logit = network(inputs) + w^T affinity          affinity: fixed columns and learned ones (`LearnedAffinity`)
    score = sigmoid(logit)

A subclass of `Backbone` implements `network`; a subclass of `FieldBackbone` gets its input as fields of one width.
"""

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
"""Standard deviation of the noise that training adds to standardised affinities, so that no column dominates."""


class LearnedAffinity(nn.Module):
    """Affinity with learned similarities: the candidate attends to the rated items; each head gives one column.

        a_jh     = softmax_h(exp(t_j) <A_j v, A_j v_h>)   v, v_h: affinity vectors of candidate and rated item h
        column j = sum_h a_jh w_h                         w_h: rating minus the user's mean

    A_j starts as a random projection that keeps inner products on average; exp(t_j) starts at 10.

    Args:
        vector: Components V of an affinity vector.
        heads: Attention heads, one column each.
        width: Components of a projected vector.

    Example:
        >>> layer = LearnedAffinity(vector=6, heads=4)
        >>> layer(torch.zeros(5, 6), torch.zeros(5, 3, 6), torch.zeros(5, 3)).shape
        torch.Size([5, 4])
    """

    def __init__(self, vector: int, *, heads: int = 4, width: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(vector, heads * width, bias=False)
        nn.init.normal_(self.project.weight, std=width**-0.5)
        self.log_scale = nn.Parameter(torch.full((heads,), 10.0).log())

    def forward(self, item: Tensor, history: Tensor, weight: Tensor) -> Tensor:
        """Affinity of each candidate to its user's rated items.

        Args:
            item: (N, V) vectors of the candidates.
            history: (N, H, V) vectors of rated items; zeros where unknown or padded.
            weight: (N, H) ratings minus the user's mean; 0 where padded.

        Returns:
            (N, heads).
        """
        query = self.project(item).unflatten(1, (self.heads, -1))  # (N, heads, width)
        query = query * self.log_scale.exp().unsqueeze(1)
        key = self.project(history).unflatten(2, (self.heads, -1))  # (N, H, heads, width)
        similarity = torch.einsum("nja,nhja->njh", query, key)  # (N, heads, H)
        known = history.abs().sum(2) > 0  # (N, H)
        attention = torch.softmax(similarity.masked_fill(~known.unsqueeze(1), -1e9), 2)  # (N, heads, H)
        return torch.einsum("njh,nh->nj", attention, weight)  # (N, heads)


class Backbone(nn.Module):
    """Base of the models: embeds users, candidates and histories; a subclass computes log-odds from them.

    N are the candidates of R requests, see `kar_offline.models.inputs`.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index, which history events need.
        embedding: Embedding dimension d.
    """

    def __init__(self, spec: InputSpec, item_categories: Tensor, *, embedding: int) -> None:
        super().__init__()
        self.spec = spec
        self.user_fields = MultiFieldEmbedding(spec.user_fields, embedding)
        self.items = ItemEmbedding(spec.items, spec.item_fields, item_categories, embedding)
        self.ratings = RatingEmbedding(embedding)
        self.learned = LearnedAffinity(spec.vector) if spec.vector else None
        self.affinity_width = spec.affinity + (self.learned.heads if self.learned else 0)
        """Columns of `affinity`."""
        if self.affinity_width:
            self.direct = nn.Linear(self.affinity_width, 1, bias=False)
            nn.init.zeros_(self.direct.weight)

    @property
    def event_width(self) -> int:
        """Columns of a history event: item and rating."""
        return self.items.width + self.ratings.weight.shape[1]

    @property
    def user_width(self) -> int:
        """Columns of `embed_user`."""
        return self.user_fields.width + self.spec.user_numbers

    @property
    def candidate_width(self) -> int:
        """Columns of `embed_candidate`."""
        return self.items.width + self.spec.item_numbers

    @property
    def knowledge_width(self) -> int:
        """Columns of `knowledge`."""
        return self.spec.user_knowledge + self.spec.item_knowledge

    @property
    def flat_width(self) -> int:
        """Columns of `flat`."""
        entities = self.user_width + self.event_width + self.candidate_width
        return entities + self.knowledge_width + self.affinity_width

    def embed_user(self, inputs: Inputs) -> Tensor:
        """Categories and numbers of the users (R, user_width)."""
        numbers = inputs["user_numeric"][:, : self.spec.user_numbers]
        return torch.cat([self.user_fields(inputs["user_categorical"]), numbers], 1)

    def embed_candidate(self, inputs: Inputs) -> Tensor:
        """Ids, categories and numbers of the candidates (N, candidate_width)."""
        numbers = inputs["item_numeric"][:, : self.spec.item_numbers]
        return torch.cat([self.items(inputs["item_index"], inputs["item_categorical"]), numbers], 1)

    def embed_history(self, inputs: Inputs) -> Tensor:
        """Items and ratings of all history events (R, L, event_width); zeros where padded."""
        item, rating = inputs["history_item"], inputs["history_rating"]  # (R, L) each
        return torch.cat([F.embedding(item, self.items.table()), F.embedding(rating, self.ratings.table())], 2)

    def mean_event(self, inputs: Inputs) -> Tensor:
        """Mean of each history's events (R, event_width): item, then rating; zeros for an empty history."""
        item, rating = inputs["history_item"], inputs["history_rating"]  # (R, L) each
        event_count = (item != PADDING).sum(1, keepdim=True).clamp(min=1)  # (R, 1)
        table = self.items.table()
        # `embedding_bag` never holds all events at once, but ONNX does not have it.
        exporting = torch.onnx.is_in_onnx_export()
        item_sum = F.embedding(item, table).sum(1) if exporting else F.embedding_bag(item, table, mode="sum")
        buckets = self.ratings.table()  # (buckets, d)
        no_ratings = table.new_zeros(rating.shape[0], buckets.shape[0])
        bucket_counts = no_ratings.scatter_add(1, rating, torch.ones_like(rating).to(table))  # (R, buckets)
        return torch.cat([item_sum, bucket_counts @ buckets], 1) / event_count

    def knowledge(self, inputs: Inputs) -> Tensor:
        """Knowledge vectors of user and item per candidate (N, knowledge_width); a part of size 0 is left out."""
        user, item = KNOWLEDGE_INPUTS
        parts = [self.spread(inputs, inputs[user])] if self.spec.user_knowledge else []
        parts += [inputs[item]] if self.spec.item_knowledge else []
        return torch.cat(parts, 1) if parts else inputs["item_numeric"][:, :0]

    def affinity(self, inputs: Inputs) -> Tensor:
        """Affinity per candidate (N, affinity_width): the fixed columns, then the learned ones.

        Only `network` may call this: its inputs hold all columns, with noise in training. There may be 0 columns.
        """
        return inputs.get(AFFINITY, inputs["item_numeric"][:, :0])

    def flat(self, inputs: Inputs) -> Tensor:
        """User, mean event, candidate, knowledge and affinity side by side (N, flat_width)."""
        request = self.spread(inputs, torch.cat([self.embed_user(inputs), self.mean_event(inputs)], 1))
        return torch.cat([request, self.embed_candidate(inputs), self.knowledge(inputs), self.affinity(inputs)], 1)

    @staticmethod
    def spread(inputs: Inputs, request_rows: Tensor) -> Tensor:
        """Repeat the row of each request for each of its candidates.

        Args:
            inputs: Inputs of the model. Without `request_of_row`, every candidate is a request of its own.
            request_rows: (R, ...).

        Returns:
            (N, ...).
        """
        return request_rows[inputs[REQUEST_OF_ROW]] if REQUEST_OF_ROW in inputs else request_rows

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds (N,) without the direct part of the affinity.

        The score of a candidate may depend on the candidate and its request only.
        """
        raise NotImplementedError

    def logits(self, inputs: Inputs) -> Tensor:
        """Log-odds (N,): the network's, plus the linear direct part of the affinity."""
        if not self.affinity_width:
            return self.network(inputs)
        columns = self._affinity_columns(inputs)  # (N, affinity_width)
        return self.network({**inputs, AFFINITY: columns}) + self.direct(columns).squeeze(1)

    def _affinity_columns(self, inputs: Inputs) -> Tensor:
        """All affinity columns (N, affinity_width); in training the fixed ones are noisy."""
        columns = self.affinity(inputs)
        if self.training:
            columns = columns + AFFINITY_NOISE * torch.randn_like(columns)
        if self.learned is None:
            return columns
        history, weight = (self.spread(inputs, inputs[name]) for name in ("history_vector", "history_weight"))
        return torch.cat([columns, self.learned(inputs["item_vector"], history, weight)], 1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean log loss, a scalar.

        Args:
            logits: (N,) log-odds.
            labels: (N,) float, 0 or 1.
        """
        return F.binary_cross_entropy_with_logits(logits, labels)

    def forward(self, inputs: Inputs) -> Tensor:
        """Probabilities (N,) of a positive label."""
        return torch.sigmoid(self.logits(inputs))


class FieldBackbone(Backbone):
    """Base of the models that read their input as M fields of d components each.

    The fields are the user's categories; the mean event's item id, item categories and rating; the candidate's id and
    categories; and, each projected to d components, the user's numbers, the candidate's numbers, the user's knowledge,
    the item's knowledge and the affinities. Inputs of size 0 have no field. Arguments as in `Backbone`.
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
        """All fields (N, M, d)."""
        user = torch.cat([self.user_fields(inputs["user_categorical"]), self.mean_event(inputs)], 1)  # (R, ...)
        user_knowledge, item_knowledge = self.knowledge(inputs).split(self.dense_sizes[2:4], 1)
        dense = (
            self.spread(inputs, inputs["user_numeric"][:, : self.spec.user_numbers]),
            inputs["item_numeric"][:, : self.spec.item_numbers],
            user_knowledge,
            item_knowledge,
            self.affinity(inputs),
        )
        projected = [project(values) for project, values in zip(self.dense, dense, strict=True)]  # (N, d or 0) each
        item = self.items(inputs["item_index"], inputs["item_categorical"])  # (N, item width)
        fields = torch.cat([self.spread(inputs, user), item, *projected], 1)  # (N, M * d)
        return fields.unflatten(1, (self.field_count, self.embedding))  # (N, M, d)


class MakeBackbone(Protocol):
    """A constructor of a backbone, as the registry holds it."""

    def __call__(self, spec: InputSpec, item_categories: Tensor) -> Backbone:
        """A model with fresh weights."""
        ...
