"""Owns the base of the rerankers: candidate rows as padded lists and back, and attention that ignores padding.

A reranker scores a candidate in the context of its request's other candidates. It reads one row per candidate
(`Backbone.flat`, knowledge and affinities included), in list order: the order of the initial ranker, if there is one.
`request_of_row` must be in rising order; without it every candidate is a list of its own. Training minimises the mean
log loss of all rows: scores are probabilities, and lists without a positive row contribute as well.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import REQUEST_OF_ROW, Inputs

__all__ = ["AttentionBlock", "ListView", "Reranker"]


@dataclass(frozen=True, slots=True)
class ListView:
    """The places of N candidate rows in R padded lists of C places, C being the length of the longest list."""

    index: Tensor
    """(R, C) int64, the row at each place; 0 where padded."""
    real: Tensor
    """(R, C) bool, False where padded."""
    request: Tensor
    """(N,) int64, the request of each row."""
    position: Tensor
    """(N,) int64, the place of each row in its list, from 0."""

    @staticmethod
    def of(inputs: Inputs) -> "ListView":
        """The view that `request_of_row` describes."""
        row = torch.arange(inputs["item_index"].shape[0], device=inputs["item_index"].device)  # (N,)
        request = inputs.get(REQUEST_OF_ROW, row)  # (N,)
        count = torch.zeros_like(inputs["history_item"][:, 0]).scatter_add(0, request, torch.ones_like(request))  # (R,)
        start = count.cumsum(0) - count  # (R,)
        # The maximum stays a tensor: as a number it would be a constant of the exported graph.
        place = torch.arange(cast(int, count.max()), device=row.device)  # (C,)
        real = place < count.unsqueeze(1)  # (R, C)
        return ListView((start.unsqueeze(1) + place) * real, real, request, row - start[request])

    def lists(self, rows: Tensor) -> Tensor:
        """Rows (N, width) as lists (R, C, width); zeros where padded."""
        return rows[self.index] * self.real.unsqueeze(2)

    def rows(self, lists: Tensor) -> Tensor:
        """Lists (R, C, width) as rows (N, width)."""
        return lists.flatten(0, 1)[self.request * lists.shape[1] + self.position]


class Reranker(Backbone):
    """Base of the rerankers. A subclass implements `rerank`; arguments as in `Backbone`."""

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds (N,). The score of a candidate depends on its whole list."""
        view = ListView.of(inputs)
        return view.rows(self.rerank(view, inputs).unsqueeze(2)).squeeze(1)

    def rerank(self, view: ListView, inputs: Inputs) -> Tensor:
        """Log-odds of lists.

        Args:
            view: The places of the candidates in the lists.
            inputs: Inputs of the model.

        Returns:
            (R, C); values at padded places are ignored.
        """
        raise NotImplementedError


class AttentionBlock(nn.Module):
    """Multi-head attention and a feed-forward layer, each followed by a residual sum and layer normalisation.

        h   = LayerNorm(q + Attention(q, k, k))
        out = LayerNorm(h + W2 ReLU(W1 h))

    Args:
        width: Components of queries, keys and outputs.
        heads: Attention heads.
        dropout: Probability that a component is dropped before a residual sum.

    Example:
        >>> block = AttentionBlock(width=8, heads=2, dropout=0.0)
        >>> real = torch.tensor([[True, True, False]])
        >>> block(torch.zeros(1, 4, 8), torch.zeros(1, 3, 8), real).shape
        torch.Size([1, 4, 8])

    Source: Vaswani et al., "Attention Is All You Need" (NeurIPS 2017, arXiv 1706.03762).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.merge = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, keys: Tensor, real: Tensor) -> Tensor:
        """Let queries attend to keys.

        Args:
            queries: (R, Q, width).
            keys: (R, K, width).
            real: (R, K) bool, False for keys that are padding.

        Returns:
            (R, Q, width).
        """
        key, value = self.key_value(keys).chunk(2, 2)  # (R, K, width) each
        query, key, value = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2) for projected in (self.query(queries), key, value)
        )  # (R, heads, Q or K, width / heads)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5  # (R, heads, Q, K)
        attention = torch.softmax(scores.masked_fill(~real[:, None, None], -1e9), 3)  # (R, heads, Q, K)
        merged = self.merge((attention @ value).transpose(1, 2).flatten(2))  # (R, Q, width)
        hidden = self.norms[0](queries + self.dropout(merged))  # (R, Q, width)
        return self.norms[1](hidden + self.dropout(self.feed(hidden)))  # (R, Q, width)
