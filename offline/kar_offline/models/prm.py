"""Owns PRM: a transformer over the list, each item with an embedding of its initial place.

    e_c = W x_c + p_min(c, P),   two attention blocks over the real items,   logit_c = w^T h_c + b

The personal vector of the paper is what x_c knows of the user. The order of the list matters by design. Source: Pei et
al., "Personalized Re-ranking for Recommendation" (RecSys 2019, arXiv 1904.06813).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.reranker import AttentionBlock, ListView, Reranker

__all__ = ["PRM"]


class PRM(Reranker):
    """Personalised re-ranking model; arguments as in `Backbone`, `places` P have an embedding of their own."""

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        width: int = 64,
        blocks: int = 2,
        heads: int = 2,
        places: int = 30,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.enter = nn.Linear(self.flat_width, width)
        self.place = nn.Embedding(places, width)
        nn.init.normal_(self.place.weight, std=0.01)
        self.blocks = nn.ModuleList(AttentionBlock(width, heads, dropout) for _ in range(blocks))
        self.output = nn.Linear(width, 1)

    def rerank(self, view: ListView, inputs: Inputs) -> Tensor:
        """Log-odds [R, C]."""
        rows = view.lists(self.enter(self.flat(inputs)))
        place = torch.arange(rows.shape[1], device=rows.device).clamp(max=self.place.num_embeddings - 1)
        hidden = rows + self.place(place)
        for block in self.blocks:
            hidden = block(hidden, hidden, view.real)
        return self.output(hidden).squeeze(2)
