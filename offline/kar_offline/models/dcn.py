"""Owns DCN: vector-wise crosses of bounded degree beside an MLP, both over one flat input.

    x_{l+1} = x_0 (x_l^T w_l) + b_l + x_l,   l = 0, 1, 2
    logit   = v^T [x_3, MLP(x_0)] + c

x_0 is `Backbone.flat`, knowledge and affinities included.

Source: Wang et al., "Deep & Cross Network for Ad Click Predictions" (AdKDD 2017, arXiv 1708.05123).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["DCN"]


class DCN(Backbone):
    """Deep and cross network; sizes as in the KAR paper.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        crosses: Cross layers.
        hidden: Units of the MLP's layers.
        dropout: Probability that a unit of the MLP is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = DCN(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        crosses: int = 3,
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        width = self.flat_width
        self.weights = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(crosses))
        self.biases = nn.Parameter(torch.zeros(crosses, width))
        self.deep = MLP(width, hidden, lambda _: nn.ReLU(), dropout)
        self.output = nn.Linear(width + hidden[-1], 1)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds (N,)."""
        flat = self.flat(inputs)  # (N, width)
        crossed = flat
        for layer, weight in enumerate(self.weights):
            crossed = flat * weight(crossed) + self.biases[layer] + crossed  # (N, width)
        deep = self.deep(flat)  # (N, hidden)
        return self.output(torch.cat([crossed, deep], 1)).squeeze(1)  # (N,)
