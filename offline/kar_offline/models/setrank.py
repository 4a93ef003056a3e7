"""Owns SetRank: induced self-attention over the set of candidates, whose order does not matter.

    h       = MAB(I, X),   X' = MAB(X, h)     two such blocks
    logit_c = w^T x'_c + b

X are the rows of the candidates (`Backbone.flat`), projected; I are learned inducing points; MAB, the multi-head
attention block, is `AttentionBlock`.

Source: Pang et al., "SetRank: Learning a Permutation-Invariant Ranking Model for Information Retrieval" (SIGIR 2020,
arXiv 1912.05891).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.reranker import AttentionBlock, ListView, Reranker

__all__ = ["SetRank"]


class SetRank(Reranker):
    """Permutation-equivariant set ranking.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        width: Components of a candidate inside the model.
        blocks: Pairs of attention blocks.
        heads: Attention heads.
        points: Inducing points.
        dropout: Probability that a component of a block's output is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = SetRank(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
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
        """Log-odds (R, C)."""
        hidden = view.lists(self.enter(self.flat(inputs)))  # (R, C, width)
        lists, point_count = hidden.shape[0], self.points.shape[1]
        all_points = torch.ones_like(hidden[:, :1, :1], dtype=torch.bool).expand(-1, point_count, -1).squeeze(2)
        for number, (gather, give) in enumerate(zip(self.gather, self.give, strict=True)):
            points = self.points[number].expand(lists, -1, -1)  # (R, points, width)
            summary = gather(points, hidden, view.real)  # (R, points, width)
            hidden = give(hidden, summary, all_points)  # (R, C, width)
        return self.output(hidden).squeeze(2)  # (R, C)
