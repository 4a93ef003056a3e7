"""Owns xDeepFM: a compressed interaction network (CIN) of explicit vector-wise crosses beside linear and deep parts.

    X^{l+1}_h = ReLU(sum_{i,j} W^{l,h}_ij (X^l_i * X^0_j) + b^l_h),   X^0 the fields [M, d], * elementwise
    logit     = first(x) + w^T [sum_d X^1, sum_d X^2] + v^T MLP(x) + b

Fields are those of `FieldBackbone`, knowledge and affinities among them; x lies flat. Source: Lian et al., "xDeepFM:
Combining Explicit and Implicit Feature Interactions for Recommender Systems" (KDD 2018, arXiv 1803.05170).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import FieldBackbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["XDeepFM"]


class XDeepFM(FieldBackbone):
    """Compressed interaction network and MLP; arguments as in `Backbone`, sizes as in the KAR paper."""

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        maps: tuple[int, ...] = (50, 50),
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        count = self.field_count
        self.compress = nn.ModuleList(
            nn.Linear(before * count, after) for before, after in zip((count, *maps), maps, strict=False)
        )
        width = count * embedding
        self.first = nn.Linear(width, 1)
        self.deep = MLP(width, hidden, lambda _: nn.ReLU(), dropout)
        self.output = nn.Linear(sum(maps) + hidden[-1], 1, bias=False)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]."""
        fields = self.fields(inputs)  # [N, M, d]
        flat = fields.flatten(1)
        first_maps = maps = fields.transpose(1, 2)  # [N, d, M]
        pooled = []
        for layer in self.compress:
            products = maps.unsqueeze(3) * first_maps.unsqueeze(2)  # [N, d, H, M]
            maps = torch.relu(layer(products.flatten(2)))  # [N, d, H']
            pooled.append(maps.sum(1))
        return (self.first(flat) + self.output(torch.cat([*pooled, self.deep(flat)], 1))).squeeze(1)
