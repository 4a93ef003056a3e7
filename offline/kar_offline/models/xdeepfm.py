"""Owns xDeepFM: a compressed interaction network (CIN) of vector-wise crosses beside a linear part and an MLP.

    X^{l+1}_h = ReLU(sum_{i,j} W^{l,h}_ij (X^l_i * X^0_j) + b^l_h)
    logit     = first(x) + w^T [sum_d X^1, sum_d X^2] + v^T MLP(x) + b

X^0 are the fields (M, d) of `FieldBackbone`, knowledge and affinities included; x is X^0 flattened; * multiplies
element by element.

Source: Lian et al., "xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender Systems" (KDD 2018,
arXiv 1803.05170).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import FieldBackbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["XDeepFM"]


class XDeepFM(FieldBackbone):
    """Compressed interaction network and MLP; sizes as in the KAR paper.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        maps: Feature maps of each CIN layer.
        hidden: Units of the MLP's layers.
        dropout: Probability that a unit of the MLP is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = XDeepFM(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

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
        """Log-odds (N,)."""
        fields = self.fields(inputs)  # (N, M, d)
        flat = fields.flatten(1)  # (N, M * d)
        first_maps = maps = fields.transpose(1, 2)  # (N, d, M)
        pooled = []
        for compress in self.compress:
            products = maps.unsqueeze(3) * first_maps.unsqueeze(2)  # (N, d, maps, M)
            maps = torch.relu(compress(products.flatten(2)))  # (N, d, next maps)
            pooled.append(maps.sum(1))  # (N, next maps)
        crossed_and_deep = torch.cat([*pooled, self.deep(flat)], 1)  # (N, all maps + hidden)
        return (self.first(flat) + self.output(crossed_and_deep)).squeeze(1)  # (N,)
