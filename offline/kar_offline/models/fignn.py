"""Owns FiGNN: fields are the nodes of a complete graph and exchange messages along learned edges.

    w_ij  = softmax over j != i of LeakyReLU(u^T [h^0_i, h^0_j])
    a_i   = W_in_i sum_j w_ij W_out_j h_j + b,   h_i <- GRU(a_i, h_i) + h^0_i   two steps
    logit = sum_i sigmoid(G [h_1, ..., h_M])_i s^T h_i

h^0 are the fields (M, d) of `FieldBackbone`, knowledge and affinities included. Every node has its own W_out_j and
W_in_i, as in the paper.

Source: Li et al., "Fi-GNN: Modeling Feature Interactions via Graph Neural Networks for CTR Prediction" (CIKM 2019,
arXiv 1910.05552).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_offline.models.backbone import FieldBackbone
from kar_offline.models.inputs import Inputs, InputSpec

__all__ = ["FiGNN"]


class FiGNN(FieldBackbone):
    """Graph neural network over fields; two steps of messages as in the KAR paper.

    Args:
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.
        embedding: Embedding dimension d.
        layers: Steps of messages.

    Example:
        >>> from kar_offline.models import example_inputs
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=1)
        >>> model = FiGNN(spec, torch.zeros(10, 1, dtype=torch.int64)).eval()
        >>> model(example_inputs(spec, candidates=5, requests=2)).shape
        torch.Size([5])
    """

    loops: Tensor

    def __init__(
        self,
        spec: InputSpec,
        item_categories: Tensor,
        *,
        embedding: int = 32,
        layers: int = 2,
    ) -> None:
        super().__init__(spec, item_categories, embedding=embedding)
        count = self.field_count
        self.layers = layers
        self.edge_from = nn.Linear(embedding, 1, bias=False)
        self.edge_to = nn.Linear(embedding, 1, bias=False)
        self.outgoing = nn.Parameter(torch.empty(count, embedding, embedding))
        self.incoming = nn.Parameter(torch.empty(count, embedding, embedding))
        self.bias = nn.Parameter(torch.zeros(embedding))
        for weight in (self.outgoing, self.incoming):
            nn.init.xavier_normal_(weight)
        self.update = nn.GRUCell(embedding, embedding)
        self.attend = nn.Linear(count * embedding, count, bias=False)
        self.score = nn.Linear(embedding, 1, bias=False)
        self.register_buffer("loops", torch.eye(count, dtype=torch.bool), persistent=False)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds (N,)."""
        initial = state = self.fields(inputs)  # (N, M, d)
        edge_scores = self.edge_from(initial) + self.edge_to(initial).transpose(1, 2)  # (N, M, M)
        edges = F.leaky_relu(edge_scores, 0.01).masked_fill(self.loops, -1e9)
        graph = torch.softmax(edges, 2)  # (N, M, M)
        for _ in range(self.layers):
            sent = torch.einsum("mde,nme->nmd", self.outgoing, state)  # (N, M, d)
            received = torch.einsum("mde,nme->nmd", self.incoming, graph @ sent) + self.bias  # (N, M, d)
            updated = self.update(received.flatten(0, 1), state.flatten(0, 1))  # (N * M, d)
            state = updated.unflatten(0, (-1, self.field_count)) + initial  # (N, M, d)
        node_weight = torch.sigmoid(self.attend(state.flatten(1)))  # (N, M)
        return (node_weight * self.score(state).squeeze(2)).sum(1)  # (N,)
