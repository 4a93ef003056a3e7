"""Owns AutoInt: layers of multi-head self-attention between fields, beside an MLP.

    E' = ReLU(concat_h softmax(E Q_h (E K_h)^T) E V_h + E R),   three layers, two heads, width 64 together
    logit = w^T [flatten(E'''), MLP(x)] + b

E are the fields of `FieldBackbone`, knowledge and affinities among them. Scores are not scaled, as in the paper.
Source: Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks" (CIKM 2019,
arXiv 1810.11921).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import FieldBackbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["AutoInt"]


class FieldAttention(nn.Module):
    """One layer: fields [N, M, inputs] attend to each other and become [N, M, width]."""

    def __init__(self, inputs: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.project = nn.Linear(inputs, 4 * width, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        """Attended fields [N, M, width]."""
        query, key, value, residual = self.project(fields).split(self.width, 2)
        query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        attention = torch.softmax(query @ key.transpose(2, 3), 3)  # [N, h, M, M]
        return torch.relu((attention @ value).transpose(1, 2).flatten(2) + residual)


class AutoInt(FieldBackbone):
    """Self-attentive field interactions; arguments as in `Backbone`, sizes as in the KAR paper."""

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        width: int = 64,
        layers: int = 3,
        heads: int = 2,
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        widths = [embedding, *[width] * layers]
        self.attention = nn.Sequential(*(FieldAttention(a, width, heads) for a in widths[:-1]))
        self.deep = MLP(self.field_count * embedding, hidden, lambda _: nn.ReLU(), dropout)
        self.output = nn.Linear(self.field_count * width + hidden[-1], 1)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]."""
        fields = self.fields(inputs)
        attended = self.attention(fields).flatten(1)
        return self.output(torch.cat([attended, self.deep(fields.flatten(1))], 1)).squeeze(1)
