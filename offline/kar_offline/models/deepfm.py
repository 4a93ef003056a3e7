"""Owns DeepFM: a factorisation machine and an MLP over shared field embeddings.

    logit = first(x) + sum_{i<j} <f_i, f_j> + w^T MLP(x) + b
    sum_{i<j} <f_i, f_j> = 1/2 sum_k ((sum_i f_ik)^2 - sum_i f_ik^2)

f_i are the embedded fields alone: knowledge and affinities take part in the first-order term and in the deep input x,
not in the second order. The first-order term is linear in x (`Backbone.flat`), which holds every embedding and number:
a weight of its own for each category would only rescale that. Source: Guo et al., "DeepFM: A Factorization-Machine
based Neural Network for CTR Prediction" (IJCAI 2017, arXiv 1703.04247).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["DeepFM"]


class DeepFM(Backbone):
    """Deep factorisation machine; arguments as in `Backbone`, sizes as in the KAR paper."""

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        hidden: tuple[int, ...] = (200, 80),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        self.embedding = embedding
        self.first = nn.Linear(self.flat_width, 1)
        self.deep = MLP(self.flat_width, hidden, lambda _: nn.ReLU(), dropout)
        self.output = nn.Linear(hidden[-1], 1, bias=False)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]."""
        user = self.user_fields(inputs["user_categorical"])
        event = self.mean_event(inputs)
        candidate = self.embed_candidate(inputs)
        numbers = inputs["user_numeric"][:, : self.spec.user_numbers]
        request = self.spread(inputs, torch.cat([user, numbers, event], 1))
        flat = torch.cat([request, candidate, self.knowledge(inputs), self.affinity(inputs)], 1)
        embedded = torch.cat([self.spread(inputs, torch.cat([user, event], 1)), candidate[:, : self.items.width]], 1)
        fields = embedded.unflatten(1, (-1, self.embedding))  # [N, M, d]
        second = (fields.sum(1).square() - fields.square().sum(1)).sum(1) / 2
        return self.first(flat).squeeze(1) + second + self.output(self.deep(flat)).squeeze(1)
