"""Owns DCNv2, parallel form: crosses of bounded degree beside an MLP over one flat input.

    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l,   l = 0, 1, 2
    logit   = w^T [x_3, MLP(x_0)] + b

x_0 holds user fields and numbers, the masked mean of history events, the candidate's id, fields and numbers and,
where they are used, knowledge vectors and affinities. Source: Wang et al., "DCN V2: Improved Deep & Cross Network and
Practical Lessons for Web-scale Learning to Rank Systems" (WWW 2021, arXiv 2008.13535).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["DCNv2"]


class DCNv2(Backbone):
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
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(crosses))
        self.deep = MLP(width, hidden, lambda _: nn.ReLU(), dropout)
        self.output = nn.Linear(width + hidden[-1], 1)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]."""
        flat = self.flat(inputs)
        crossed = flat
        for layer in self.crosses:
            crossed = flat * layer(crossed) + crossed
        return self.output(torch.cat([crossed, self.deep(flat)], 1)).squeeze(1)
