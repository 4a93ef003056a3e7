"""Owns FiGNN: fields are the nodes of a complete graph and pass messages along learned edges.

    w_ij  = softmax over j != i of LeakyReLU(u^T [h^0_i, h^0_j])
    a_i   = W_in_i sum_j w_ij W_out_j h_j + b,   h_i <- GRU(a_i, h_i) + h^0_i   two steps
    logit = sum_i sigmoid(G [h_1, ..., h_M])_i s^T h_i

h^0 are the fields of `FieldBackbone`, knowledge and affinities among them; W_out_j and W_in_i differ by node, as in the
paper. Source: Li et al., "Fi-GNN: Modeling Feature Interactions via Graph Neural Networks for CTR Prediction" (CIKM
2019, arXiv 1910.05552).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_offline.models.backbone import FieldBackbone
from kar_offline.models.inputs import Inputs, InputSpec

__all__ = ["FiGNN"]


class FiGNN(FieldBackbone):
    """Graph neural network over fields; arguments as in `Backbone`, two layers as in the KAR paper."""

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
        count, d = self.field_count, embedding
        self.layers = layers
        self.edge_from = nn.Linear(d, 1, bias=False)
        self.edge_to = nn.Linear(d, 1, bias=False)
        self.outgoing = nn.Parameter(torch.empty(count, d, d))
        self.incoming = nn.Parameter(torch.empty(count, d, d))
        self.bias = nn.Parameter(torch.zeros(d))
        for weight in (self.outgoing, self.incoming):
            nn.init.xavier_normal_(weight)
        self.update = nn.GRUCell(d, d)
        self.attend = nn.Linear(count * d, count, bias=False)
        self.score = nn.Linear(d, 1, bias=False)
        self.register_buffer("loops", torch.eye(count, dtype=torch.bool), persistent=False)

    def network(self, inputs: Inputs) -> Tensor:
        """Log-odds [N]."""
        start = state = self.fields(inputs)  # [N, M, d]
        edges = F.leaky_relu(self.edge_from(start) + self.edge_to(start).transpose(1, 2), 0.01)  # [N, M, M]
        graph = torch.softmax(edges.masked_fill(self.loops, -1e9), 2)
        for _ in range(self.layers):
            sent = torch.einsum("mde,nme->nmd", self.outgoing, state)
            received = torch.einsum("mde,nme->nmd", self.incoming, graph @ sent) + self.bias
            updated = self.update(received.flatten(0, 1), state.flatten(0, 1))
            state = updated.unflatten(0, (-1, self.field_count)) + start
        weight = torch.sigmoid(self.attend(state.flatten(1)))  # [N, M]
        return (weight * self.score(state).squeeze(2)).sum(1)
