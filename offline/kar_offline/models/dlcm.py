"""Owns DLCM: a GRU reads the list from its end to its top; every item is scored against what was read.

    o_c, s = GRU(x_C, ..., x_1)
    logit_c = v^T (o_c * tanh(W s + b)) + w^T o_c + d

The order of the list matters by design; places behind its end are never read. The paper's attention-rank loss gives
way to the log loss that all our rerankers share. Source: Ai et al., "Learning a Deep Listwise Context Model for
Ranking Refinement" (SIGIR 2018, arXiv 1804.05936).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.reranker import ListView, Reranker

__all__ = ["DLCM"]


class DLCM(Reranker):
    """Deep listwise context model; arguments as in `Backbone`."""

    def __init__(
        self, spec: InputSpec, item_categories: Tensor, *, embedding: int = 32, width: int = 64, dropout: float = 0.2
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.enter = nn.Sequential(nn.Linear(self.flat_width, width), nn.ReLU(), nn.Dropout(dropout))
        self.read = nn.GRU(width, width, batch_first=True)
        self.context = nn.Linear(width, width)
        self.match = nn.Linear(width, 1, bias=False)
        self.own = nn.Linear(width, 1)

    def rerank(self, view: ListView, inputs: Inputs) -> Tensor:
        """Log-odds [R, C]."""
        rows = view.lists(self.enter(self.flat(inputs)))
        # Read backwards, padding comes first; it must not move the state, so it is left behind the end instead.
        count = view.real.sum(1, keepdim=True)
        place = torch.arange(rows.shape[1], device=rows.device)
        backwards = ((count - 1 - place) * view.real).unsqueeze(2).expand_as(rows)
        read, _ = self.read(rows.gather(1, backwards), rows.new_zeros(1, rows.shape[0], rows.shape[2]))
        last = read.gather(1, (count - 1).clamp(min=0).unsqueeze(2).expand(-1, 1, rows.shape[2]))
        outputs = read.gather(1, backwards)
        return (self.match(outputs * torch.tanh(self.context(last))) + self.own(outputs)).squeeze(2)
