"""Owns SetRank: induced self-attention over the set of candidates, whose order does not matter.

    h = MAB(I, X),   X' = MAB(X, h)     I: learned induced points; two such blocks
    logit_c = w^T x'_c + b

MAB is `AttentionBlock`. Source: Pang et al., "SetRank: Learning a Permutation-Invariant Ranking Model for Information
Retrieval" (SIGIR 2020, arXiv 1912.05891).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.reranker import AttentionBlock, ListView, Reranker

__all__ = ["SetRank"]


class SetRank(Reranker):
    """Permutation-equivariant set ranking; arguments as in `Backbone`."""

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        width: int = 64,
        blocks: int = 2,
        heads: int = 2,
        points: int = 20,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.enter = nn.Linear(self.flat_width, width)
        self.points = nn.Parameter(torch.randn(blocks, points, width) * width**-0.5)
        self.gather = nn.ModuleList(AttentionBlock(width, heads, dropout) for _ in range(blocks))
        self.give = nn.ModuleList(AttentionBlock(width, heads, dropout) for _ in range(blocks))
        self.output = nn.Linear(width, 1)

    def rerank(self, view: ListView, inputs: Inputs) -> Tensor:
        """Log-odds [R, C]."""
        hidden = view.lists(self.enter(self.flat(inputs)))
        every = torch.ones_like(hidden[:, :1, :1], dtype=torch.bool).expand(-1, self.points.shape[1], -1).squeeze(2)
        for number, (gather, give) in enumerate(zip(self.gather, self.give, strict=True)):
            points = self.points[number].expand(hidden.shape[0], -1, -1)
            hidden = give(hidden, gather(points, hidden, view.real), every)
        return self.output(hidden).squeeze(2)
