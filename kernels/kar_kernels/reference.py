"""Owns the frozen definition of the hybrid-expert adaptor: every faster form is tested against this loop.

Source: Xi et al., "Towards Open-World Recommendation with Knowledge Augmentation from Large Language Models"
(RecSys 2024, arXiv 2306.10933). Two towers t in {user, item}, inputs x_t in R^D, S experts that both towers share
and P dedicated ones a tower:

    f_k(x) = ReLU(W2_k ReLU(W1_k x + b1_k) + b2_k)            D -> H -> K
    g_t    = softmax(G_t x_t + c_t)                           over the S + P experts of the tower
    out_t  = sum_k g_t[k] f_k(x_t)                            in R^K

ReLU follows the second layer too, so the gate cannot be folded into W2. Towers never interact.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Expert", "hybrid_expert_reference"]


class Expert(NamedTuple):
    """One expert's weights: `weight1` [H, D], `bias1` [H], `weight2` [K, H], `bias2` [K]."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


def hybrid_expert_reference(x: Tensor, experts: Sequence[Expert], gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
    """One tower's output [B, K] for `x` [B, D], experts in gate order, `gate_weight` [S + P, D], `gate_bias` [S + P].

    All tensors have one floating-point dtype, in which everything is computed.
    """
    gates = torch.softmax(x @ gate_weight.T + gate_bias, dim=-1)
    out = x.new_zeros(len(x), len(experts[0].bias2))
    for k, expert in enumerate(experts):
        hidden = torch.relu(x @ expert.weight1.T + expert.bias1)
        out = out + gates[:, k : k + 1] * torch.relu(hidden @ expert.weight2.T + expert.bias2)
    return out
