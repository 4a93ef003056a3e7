"""Owns PRM: a transformer over the list, in which every candidate has an embedding of its initial place.

    e_c     = W x_c + p_min(c, P)
    h       = two attention blocks over the e_c of real candidates
    logit_c = w^T h_c + b

x_c is the row of candidate c (`Backbone.flat`); its user features replace the paper's personalised vector. The order of
the list matters by design.

Source: Pei et al., "Personalized Re-ranking for Recommendation" (RecSys 2019, arXiv 1904.06813).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.reranker import AttentionBlock, ListView, Reranker

__all__ = ["PRM"]


class PRM(Reranker):
    """Personalised re-ranking model.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        width: Components of a candidate inside the model.
        blocks: Attention blocks.
        heads: Attention heads.
        places: P, places with an embedding of their own; later places share the last one.
        dropout: Probability that a component of a block's output is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = PRM(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
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
        """Log-odds (R, C)."""
        candidates = view.lists(self.enter(self.flat(inputs)))  # (R, C, width)
        place = torch.arange(candidates.shape[1], device=candidates.device)  # (C,)
        hidden = candidates + self.place(place.clamp(max=self.place.num_embeddings - 1))  # (R, C, width)
        for block in self.blocks:
            hidden = block(hidden, hidden, view.real)  # (R, C, width)
        return self.output(hidden).squeeze(2)  # (R, C)
