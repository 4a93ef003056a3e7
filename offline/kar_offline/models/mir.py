"""Owns MIR: interactions among the candidates, within the history, and between the two.

    S     = AttentionBlock(W x)                      the candidates among each other, without order
    H     = GRU(events)                              the history in order
    Z     = softmax over real events of (S M H^T) H  the part of the history that matters to each candidate
    logit = MLP([W x, S, Z, S * Z])

x are the rows of the candidates (`Backbone.flat`), knowledge and affinities included. The paper's SLAttention also
attends from the history to the set, and feature by feature. Scores do not read these parts, so only the item-level
attention from the set to the history is implemented.

Source: Xi et al., "Multi-Level Interaction Reranking with User Behavior History" (SIGIR 2022, arXiv 2204.09370).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP
from kar_offline.models.reranker import AttentionBlock, ListView, Reranker
from kar_sidecar.features import PADDING

__all__ = ["MIR"]


class MIR(Reranker):
    """Multi-level interaction reranking.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        width: Components of a candidate inside the model.
        heads: Attention heads.
        hidden: Units of the MLP's layers.
        dropout: Probability that a unit of the MLP is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = MIR(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

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
        """Log-odds (R, C)."""
        projected = view.lists(self.enter(self.flat(inputs)))  # (R, C, width)
        candidates = self.among(projected, projected, view.real)  # (R, C, width)
        events = self.embed_history(inputs)  # (R, L, event_width)
        no_state = events.new_zeros(1, events.shape[0], self.history.hidden_size)
        history, _ = self.history(events, no_state)  # (R, L, width)
        real = (inputs["history_item"] != PADDING).unsqueeze(1)  # (R, 1, L)
        scores = self.relate(candidates) @ history.transpose(1, 2)  # (R, C, L)
        relevant = (torch.softmax(scores.masked_fill(~real, -1e9), 2) * real) @ history  # (R, C, width)
        joined = torch.cat([projected, candidates, relevant, candidates * relevant], 2)  # (R, C, 4 width)
        return self.output(self.deep(joined)).squeeze(2)  # (R, C)
