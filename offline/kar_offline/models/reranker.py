"""Owns what rerankers share: lists of candidates out of flat rows and back, attention that knows what is padding.

A reranker scores a candidate among those of its request. Its input is one row a candidate (`Backbone.flat`, knowledge
and affinities included), in the order of the list, which is the initial ranker's where there is one. Rows carry
`request_of_row` in rising order; without it every candidate is a list of its own. Training minimises the mean log
loss of all rows, so that a score stays a probability and lists without any positive teach something, too.
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
    """Where the rows [N] of R requests lie in lists [R, C] of the longest one's length C."""

    index: Tensor
    """[R, C] int64 row at each place; 0 where there is none."""
    real: Tensor
    """[R, C] bool: whether there is one."""
    request: Tensor
    """[N] int64 request of each row."""
    position: Tensor
    """[N] int64 place of each row in its list, from 0."""

    @staticmethod
    def of(inputs: Inputs) -> "ListView":
        """Read it off `request_of_row`."""
        row = torch.arange(inputs["item_index"].shape[0], device=inputs["item_index"].device)
        request = inputs.get(REQUEST_OF_ROW, row)
        count = torch.zeros_like(inputs["history_item"][:, 0]).scatter_add(0, request, torch.ones_like(request))
        start = count.cumsum(0) - count
        place = torch.arange(cast(int, count.max()), device=row.device)  # a tensor: the exported graph has no fixed C
        real = place < count.unsqueeze(1)
        return ListView((start.unsqueeze(1) + place) * real, real, request, row - start[request])

    def lists(self, rows: Tensor) -> Tensor:
        """Rows [N, w] as lists [R, C, w], zeros where padded."""
        return rows[self.index] * self.real.unsqueeze(2)

    def rows(self, lists: Tensor) -> Tensor:
        """Lists [R, C, w] as rows [N, w]."""
        return lists.flatten(0, 1)[self.request * lists.shape[1] + self.position]


class Reranker(Backbone):
    """Base of the rerankers; a subclass turns lists into log-odds."""

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]; a candidate's depends on its whole list."""
        view = ListView.of(inputs)
        return view.rows(self.rerank(view, inputs).unsqueeze(2)).squeeze(1)

    def rerank(self, view: ListView, inputs: Inputs) -> Tensor:
        """Log-odds [R, C], anything where padded."""
        raise NotImplementedError


class AttentionBlock(nn.Module):
    """Multi-head attention of queries to keys, then a feed-forward layer, each with a residual and layer norm.

        h = LayerNorm(q + Attention(q, k, k)),   out = LayerNorm(h + W2 ReLU(W1 h))

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
        """Attended `queries` [R, Q, width]; `keys` [R, K, width] count where `real` [R, K] bool is True."""
        key, value = self.key_value(keys).chunk(2, 2)
        query, key, value = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (self.query(queries), key, value)
        )  # [R, h, Q or K, width / h]
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        attention = torch.softmax(scores.masked_fill(~real[:, None, None], -1e9), 3)
        merged = self.merge((attention @ value).transpose(1, 2).flatten(2))
        hidden = self.norms[0](queries + self.dropout(merged))
        return self.norms[1](hidden + self.dropout(self.feed(hidden)))
