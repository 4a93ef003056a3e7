"""Owns FiBiNET: fields weighted by squeeze and excitation, crossed pairwise by a bilinear form, then an MLP.

    a     = ReLU(W2 ReLU(W1 mean_d(E))),   V_i = a_i E_i
    p_ij  = (E_i W) * E_j,   q_ij = (V_i W') * V_j   for i < j
    logit = w^T MLP([p, q]) + first(flatten(E)) + b

E are the fields (M, d) of `FieldBackbone`, knowledge and affinities included. All pairs share the bilinear matrices
W and W' (d, d), the variant that the paper calls "field-all"; * multiplies element by element.

Source: Huang et al., "FiBiNET: Combining Feature Importance and Bilinear feature Interaction for Click-Through Rate
Prediction" (RecSys 2019, arXiv 1905.09433).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import FieldBackbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["FiBiNET"]


class FiBiNET(FieldBackbone):
    """Feature importance and bilinear interaction.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        reduction: The squeeze has M / reduction units.
        hidden: Units of the MLP's layers.
        dropout: Probability that a unit of the MLP is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = FiBiNET(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

    left: Tensor
    right: Tensor

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        reduction: int = 3,
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        count = self.field_count
        squeezed = max(1, count // reduction)
        self.excite = nn.Sequential(
            nn.Linear(count, squeezed, bias=False), nn.ReLU(), nn.Linear(squeezed, count, bias=False), nn.ReLU()
        )
        self.bilinear = nn.Linear(embedding, embedding, bias=False)
        self.excited_bilinear = nn.Linear(embedding, embedding, bias=False)
        left, right = torch.triu_indices(count, count, 1)  # (pairs,) each
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.first = nn.Linear(count * embedding, 1)
        self.deep = MLP(2 * len(left) * embedding, hidden, lambda _: nn.ReLU(), dropout)
        self.output = nn.Linear(hidden[-1], 1, bias=False)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds (N,)."""
        fields = self.fields(inputs)  # (N, M, d)
        importance = self.excite(fields.mean(2))  # (N, M)
        excited = fields * importance.unsqueeze(2)  # (N, M, d)
        crossed = [
            bilinear(crossed_fields)[:, self.left] * crossed_fields[:, self.right]
            for bilinear, crossed_fields in ((self.bilinear, fields), (self.excited_bilinear, excited))
        ]  # (N, pairs, d) each
        deep = self.deep(torch.cat(crossed, 1).flatten(1))  # (N, hidden)
        return (self.first(fields.flatten(1)) + self.output(deep)).squeeze(1)  # (N,)
