"""Owns the plain implementation: the frozen loop of `kar_kernels.reference`, and its gradients as formulas.

    du_k = [v_k > 0] g_k dy          dW2_k = du_k^T h_k
    dz_k = [h_k > 0] du_k W2_k       dW1_k = dz_k^T x
    a_k  = <dy, v_k>                 dl    = g (a - <g, a>)       dG = dl^T x       dx = dz W1 + dl G

It runs anywhere and in any dtype; every other implementation is measured against the loop.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kar_kernels.layout import PackedWeights, Shape
from kar_kernels.reference import Expert, hybrid_expert_reference

__all__ = ["Kept", "Linear", "backward", "eager_backward", "eager_forward", "input_gradient"]

Linear = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]
"""x [n, i], weight [o, i], bias [o] or None, whether ReLU follows -> [n, o]."""


class Kept(NamedTuple):
    """A tower's results that its backward needs: gates [n, G], float32 or wider, hidden [n, G H], values [G, n, K]."""

    gates: Tensor
    hidden: Tensor
    values: Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """`Linear` by torch."""
    out = F.linear(x, weight, bias)
    return out.relu_() if relu else out


def eager_forward(user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape) -> Tensor:
    """Vectors [users + items, K] in `user`'s dtype."""
    outs = []
    for tower, x in enumerate((user, item)):
        rows, seen = weights.first[shape.tower(tower)], shape.expert(tower)
        bias = weights.bias1[shape.tower(tower)]
        experts = zip(
            rows[shape.hiddens(tower)].unflatten(0, (shape.seen, shape.hidden)),
            bias[shape.hiddens(tower)].unflatten(0, (shape.seen, shape.hidden)),
            weights.weight2[seen],
            weights.bias2[seen],
            strict=True,
        )
        gates = (rows[shape.gates(tower)], bias[shape.gates(tower)])
        out = hybrid_expert_reference(x.to(rows.dtype), [Expert(*expert) for expert in experts], *gates)
        outs.append(out.to(user.dtype))
    return torch.cat(outs)


def forward_kept(x: Tensor, weights: PackedWeights, shape: Shape, tower: int, linear: Linear = linear) -> Kept:
    """One tower's gates, hidden layers and values for `x` [n, D]."""
    own = weights.towers[tower]
    x = x.to(own.gate.dtype)
    logit = linear(x, own.gate, own.gate_bias, False)
    hidden = linear(x, own.hidden, own.hidden_bias, True)
    values = torch.baddbmm(own.second_bias, shape.each(hidden), own.second).relu_()
    return Kept(torch.softmax(logit.to(torch.promote_types(logit.dtype, torch.float32)), -1), hidden, values)


def mixed(kept: Kept) -> Tensor:
    """Vectors [n, K]: the sum of values by gate, in the gates' dtype."""
    return torch.sum(kept.values * kept.gates.t().unsqueeze(2), 0)


def first_gradient(grad: Tensor, kept: Kept, weights: PackedWeights, shape: Shape, tower: int) -> tuple[Tensor, Tensor]:
    """Gradients of a tower's first layer's outputs, dz [n, W] in the weights' dtype, and du [G, n, K]."""
    gates, values = kept.gates.t().unsqueeze(2), kept.values  # [G, n, 1], [G, n, K]
    dy = grad.to(gates.dtype)
    du = masked(dy * gates, values).to(values.dtype)
    reward = (dy * values).sum(2).t()  # [n, G]
    dl = kept.gates * (reward - (kept.gates * reward).sum(1, keepdim=True))
    dz = masked(torch.bmm(du, weights.weight2[shape.expert(tower)]), shape.each(kept.hidden))  # [G, n, H]
    out = dz.new_zeros(dz.shape[1], shape.width)
    out[:, shape.gates(tower)] = dl.to(dz.dtype)
    shape.each(out[:, shape.hiddens(tower)]).copy_(dz)
    return out, du


def masked(grad: Tensor, out: Tensor) -> Tensor:
    """`grad` where `out`, the output of a ReLU, is above 0, else 0; `torch.where` takes four times as long."""
    masked: Tensor = torch.ops.aten.threshold_backward(grad, out.to(grad.dtype), 0)
    return masked


def backward(
    grad: Tensor,
    towers: tuple[Tensor, Tensor],
    kept: tuple[Kept | None, Kept | None],
    weights: PackedWeights,
    shape: Shape,
    linear: Linear = linear,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `first`, `bias1`, `weight2`, `bias2` from what each tower kept, None for a tower without rows."""
    first_grad, bias1_grad, weight2_grad, bias2_grad = (
        torch.zeros_like(packed) for packed in (weights.first, weights.bias1, weights.weight2, weights.bias2)
    )
    parts = grad.split([x.shape[0] for x in towers])
    for tower, (x, dy, own) in enumerate(zip(towers, parts, kept, strict=True)):
        if own is None:
            continue
        dz, du = first_gradient(dy, own, weights, shape, tower)
        block, seen = shape.tower(tower), shape.expert(tower)
        first_grad[block] += linear(dz.t(), x.to(dz.dtype).t(), None, False)
        bias1_grad[block] += dz.sum(0)
        weight2_grad[seen] += torch.bmm(du.transpose(1, 2), shape.each(own.hidden))
        bias2_grad[seen] += du.sum(1)
    return first_grad, bias1_grad, weight2_grad, bias2_grad


def eager_backward(
    grad: Tensor, user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `first`, `bias1`, `weight2`, `bias2` for the gradient `grad` [users + items, K] of the vectors."""
    kept = [forward_kept(x, weights, shape, tower) if x.shape[0] else None for tower, x in enumerate((user, item))]
    return backward(grad, (user, item), (kept[0], kept[1]), weights, shape)


def input_gradient(grad: Tensor, x: Tensor, weights: PackedWeights, shape: Shape, tower: int) -> Tensor:
    """Gradient [n, D] of one tower's input; text encodings are frozen, so nothing fast is needed."""
    dz, _ = first_gradient(grad, forward_kept(x, weights, shape, tower), weights, shape, tower)
    return (dz @ weights.first[shape.tower(tower)]).to(x.dtype)
