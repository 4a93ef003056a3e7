"""Owns AutoInt: layers of multi-head self-attention between fields, beside an MLP.

    E'    = ReLU(concat_h softmax(E Q_h (E K_h)^T) E V_h + E R),   three layers, two heads of 32 components
    logit = w^T [flatten(E'''), MLP(flatten(E))] + b

E are the fields (M, d) of `FieldBackbone`, knowledge and affinities included. Attention scores are not scaled, as in
the paper.

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
    """One layer of self-attention between fields.

    Args:
        inputs: Components of a field before the layer.
        width: Components of a field after it, all heads together.
        heads: Attention heads.
    """

    def __init__(self, inputs: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.project = nn.Linear(inputs, 4 * width, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        """Let fields attend to each other.

        Args:
            fields: (N, M, inputs).

        Returns:
            (N, M, width).
        """
        query, key, value, residual = self.project(fields).split(self.width, 2)  # (N, M, width) each
        query, key, value = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2) for projected in (query, key, value)
        )  # (N, heads, M, width / heads) each
        attention = torch.softmax(query @ key.transpose(2, 3), 3)  # (N, heads, M, M)
        attended = (attention @ value).transpose(1, 2).flatten(2)  # (N, M, width)
        return torch.relu(attended + residual)


class AutoInt(FieldBackbone):
    """Self-attentive field interactions; sizes as in the KAR paper.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        width: Components of a field after attention, all heads together.
        layers: Attention layers.
        heads: Attention heads.
        hidden: Units of the MLP's layers.
        dropout: Probability that a unit of the MLP is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = AutoInt(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
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
        layers: int = 3,
        heads: int = 2,
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        layer_inputs = [embedding, *[width] * (layers - 1)]
        self.attention = nn.Sequential(*(FieldAttention(inputs, width, heads) for inputs in layer_inputs))
        self.deep = MLP(self.field_count * embedding, hidden, lambda _: nn.ReLU(), dropout)
        self.output = nn.Linear(self.field_count * width + hidden[-1], 1)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds (N,)."""
        fields = self.fields(inputs)  # (N, M, d)
        attended = self.attention(fields).flatten(1)  # (N, M * width)
        deep = self.deep(fields.flatten(1))  # (N, hidden)
        return self.output(torch.cat([attended, deep], 1)).squeeze(1)  # (N,)
