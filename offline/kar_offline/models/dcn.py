"""Owns DCN: vector-wise crosses of bounded degree beside an MLP over one flat input.

    x_{l+1} = x_0 (x_l^T w_l) + b_l + x_l,   l = 0, 1, 2
    logit   = v^T [x_3, MLP(x_0)] + c

x_0 is `Backbone.flat`, knowledge and affinities included. Source: Wang et al., "Deep & Cross Network for Ad Click
Predictions" (AdKDD 2017, arXiv 1708.05123).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["DCN"]


class DCN(Backbone):
    """Deep and cross network; arguments as in `Backbone`, sizes as in the KAR paper."""

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
        """Log-odds [N]."""
        flat = self.flat(inputs)
        crossed = flat
        for number, weight in enumerate(self.weights):
            crossed = flat * weight(crossed) + self.biases[number] + crossed
        return self.output(torch.cat([crossed, self.deep(flat)], 1)).squeeze(1)
