"""Owns DeepFM: a factorisation machine and an MLP over shared field embeddings.

    logit = first(x) + sum_{i<j} <f_i, f_j> + w^T MLP(x) + b
    sum_{i<j} <f_i, f_j> = 1/2 sum_k ((sum_i f_ik)^2 - sum_i f_ik^2)

The fields f_i are the embedded categories, ids and rating. Knowledge and affinities are part of x, so they enter the
first-order term and the MLP but not the second order. The first-order term is linear in x (`Backbone.flat`), which
holds every embedding and number; one more weight per category would only rescale it.

Source: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction" (IJCAI 2017, arXiv
1703.04247).
"""

import torch
from torch import Tensor, nn

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs, InputSpec
from kar_offline.models.layers import MLP

__all__ = ["DeepFM"]


class DeepFM(Backbone):
    """Deep factorisation machine; sizes as in the KAR paper.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        hidden: Units of the MLP's layers.
        dropout: Probability that a unit of the MLP is dropped.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = DeepFM(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

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
        """Log-odds (N,)."""
        user = self.user_fields(inputs["user_categorical"])  # (R, user fields * d)
        mean_event = self.mean_event(inputs)  # (R, event_width)
        candidate = self.embed_candidate(inputs)  # (N, candidate_width)
        user_numbers = inputs["user_numeric"][:, : self.spec.user_numbers]  # (R, Un)
        request = self.spread(inputs, torch.cat([user, user_numbers, mean_event], 1))  # (N, ...)
        flat = torch.cat([request, candidate, self.knowledge(inputs), self.affinity(inputs)], 1)  # (N, flat_width)
        request_fields = self.spread(inputs, torch.cat([user, mean_event], 1))  # (N, ...)
        embedded = torch.cat([request_fields, candidate[:, : self.items.width]], 1)  # (N, fields * d)
        fields = embedded.unflatten(1, (-1, self.embedding))  # (N, fields, d)
        second_order = (fields.sum(1).square() - fields.square().sum(1)).sum(1) / 2  # (N,)
        return self.first(flat).squeeze(1) + second_order + self.output(self.deep(flat)).squeeze(1)  # (N,)
