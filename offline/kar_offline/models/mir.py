"""Owns MIR: interactions within the set of candidates, within the history, and between the two.

    S  = AttentionBlock(W x)             candidates among each other, without order
    H  = GRU(events)                     the history in order
    A  = softmax over real events of S M H^T,   Z = A H      what each candidate finds in the history (SLAttention)
    logit = MLP([W x, S, Z, S * Z])

x is the whole row of a candidate, so knowledge and affinities enter here. The paper's SLAttention also goes from the
history to the set and feature by feature; this is its item-level part from the set to the list, which scores read.
Source: Xi et al., "Multi-Level Interaction Reranking with User Behavior History" (SIGIR 2022, arXiv 2204.09370).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP
from kar_offline.models.reranker import AttentionBlock, ListView, Reranker
from kar_sidecar.features import PADDING

__all__ = ["MIR"]


class MIR(Reranker):
    """Multi-level interaction reranking; arguments as in `Backbone`."""

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        width: int = 64,
        heads: int = 2,
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.enter = nn.Linear(self.flat_width, width)
        self.among = AttentionBlock(width, heads, dropout)
        self.history = nn.GRU(self.event_width, width, batch_first=True)
        self.relate = nn.Linear(width, width, bias=False)
        self.deep = MLP(4 * width, hidden, lambda _: nn.ReLU(), dropout)
        self.output = nn.Linear(hidden[-1], 1)

    def rerank(self, view: ListView, inputs: Inputs) -> Tensor:
        """Log-odds [R, C]."""
        item, rating = inputs["history_item"], inputs["history_rating"]
        rows = view.lists(self.enter(self.flat(inputs)))
        candidates = self.among(rows, rows, view.real)
        events = torch.cat([F.embedding(item, self.items.table()), F.embedding(rating, self.ratings.table())], 2)
        past, _ = self.history(events, events.new_zeros(1, events.shape[0], self.history.hidden_size))
        real = (item != PADDING).unsqueeze(1)  # [R, 1, L]
        scores = self.relate(candidates) @ past.transpose(1, 2)  # [R, C, L]
        found = (torch.softmax(scores.masked_fill(~real, -1e9), 2) * real) @ past
        joined = torch.cat([rows, candidates, found, candidates * found], 2)
        return self.output(self.deep(joined)).squeeze(2)
