"""Owns `tail`: the first layer of all experts and the gate as one library GEMM a tower, and one kernel for the rest.

Forward, formula in `kar_kernels.reference`: the GEMM writes z = W x + b [rows, W], gate logits among its columns, and a
program (row tile) reads it once:

    g = softmax(logits),  v_k = ReLU(W2_k ReLU(z_k) + b2_k),  out = sum_k g[k] v_k

Backward: program (chunk of rows, expert e or gate t) turns z and dy into dz (see `kar_kernels.split`), written where
the first layer's gradients are one GEMM a tower, and into its chunk's part of dW2_e and of the biases, which a last
launch sums over chunks. Rows beyond `SAVED_ROWS` are not saved: the backward computes z again, a chunk at a time.
"""

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kar_kernels.layout import PackedWeights, Shape
from kar_kernels.tiles import Tiles, arithmetic, column_of, constants, softmax_rows

__all__ = ["BACKWARD", "FORWARD", "SAVED_ROWS", "tail_backward", "tail_forward"]

FORWARD: Final = {
    "half": Tiles(64, 0, 4, 2),
    "tf32": Tiles(64, 0, 4, 2),
    "tf32x3": Tiles(16, 0, 4, 2),
    "double": Tiles(16, 0, 4, 1),
}
BACKWARD: Final = {
    "half": Tiles(32, 0, 8, 2),
    "tf32": Tiles(32, 0, 8, 2),
    "tf32x3": Tiles(32, 0, 8, 1),
    "double": Tiles(16, 0, 4, 1),
}
SAVED_ROWS: Final = 1 << 17
"""Rows of a tower; their z takes 240 MB in bfloat16 at the default sizes."""
CHUNKS: Final = 16
"""Of rows, in the backward: times 14 programs, they fill a chip of 132 multiprocessors."""


@triton.jit(do_not_specialize=["rows", "first_expert"])
def tail_forward_kernel(
    z,
    weight2,
    bias2,
    result,
    value,
    rows,
    first_expert,
    logit_at,
    hidden_at,
    SEEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Grid (row tiles of one tower). Writes result [rows, OUT] and, with SAVE, value [rows, SEEN, OUT]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = (row < rows)[:, None]
    unit, gate, out = tl.arange(0, HIDDEN), tl.arange(0, GATE_ROWS), tl.arange(0, OUT)
    line = z + row[:, None] * (GATE_ROWS + SEEN * HIDDEN)
    logit = tl.load(line + logit_at + gate[None, :], mask=exists, other=0.0).to(SUM)
    gates = softmax_rows(logit, SEEN, GATE_ROWS)
    mixed = tl.zeros((ROWS, OUT), SUM)
    for k in range(SEEN):
        hidden = tl.load(line + hidden_at + k * HIDDEN + unit[None, :], mask=exists, other=0.0)
        expert = first_expert + k
        w2 = tl.load(weight2 + (expert * OUT + out[None, :]) * HIDDEN + unit[:, None])
        hidden = tl.maximum(hidden, 0.0).to(w2.dtype)
        v = tl.dot(hidden, w2, input_precision=PRECISION, out_dtype=SUM)
        v = tl.maximum(v + tl.load(bias2 + expert * OUT + out)[None, :], 0.0)
        mixed += v * column_of(gates, k, GATE_ROWS)[:, None]
        if SAVE:
            tl.store(value + (row * SEEN + k)[:, None] * OUT + out[None, :], v, mask=exists)
    tl.store(result + row[:, None] * OUT + out[None, :], mixed, mask=exists)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "first_expert"])
def tail_backward_kernel(
    z,
    value,
    grad,
    weight2,
    z_grad,
    part,
    rows,
    chunk_rows,
    first_expert,
    logit_at,
    hidden_at,
    SEEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (chunks of rows of one tower; SEEN, then its gate).

    Writes z_grad [rows, W] and part [chunks, W + SEEN * OUT + SEEN * OUT * HIDDEN]: gradients of the tower's first
    biases, in its columns' order, of its second biases and of its second weights.
    """
    chunk, k = tl.program_id(0), tl.program_id(1)
    unit, gate, out = tl.arange(0, HIDDEN), tl.arange(0, GATE_ROWS), tl.arange(0, OUT)
    width: tl.constexpr = GATE_ROWS + SEEN * HIDDEN
    part += chunk.to(tl.int64) * (width + SEEN * OUT * (1 + HIDDEN))
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    kind = weight2.dtype.element_ty
    if k < SEEN:
        w2 = tl.load(weight2 + ((first_expert + k) * OUT + out[:, None]) * HIDDEN + unit[None, :])
        weight2_sum = tl.zeros((OUT, HIDDEN), SUM)
        bias1_sum = tl.zeros((HIDDEN,), SUM)
        bias2_sum = tl.zeros((OUT,), SUM)
        for start in range(begin, end, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            exists = (row < end)[:, None]
            logit = tl.load(z + row[:, None] * width + logit_at + gate[None, :], mask=exists, other=0.0).to(SUM)
            mine = column_of(softmax_rows(logit, SEEN, GATE_ROWS), k, GATE_ROWS)
            dy = tl.load(grad + row[:, None] * OUT + out[None, :], mask=exists, other=0.0).to(SUM)
            v = tl.load(value + (row * SEEN + k)[:, None] * OUT + out[None, :], mask=exists, other=0.0)
            at = row[:, None] * width + hidden_at + k * HIDDEN + unit[None, :]
            hidden = tl.maximum(tl.load(z + at, mask=exists, other=0.0), 0.0).to(kind)
            du = tl.where(v > 0, dy * mine[:, None], 0.0)
            dz = tl.dot(du.to(kind), w2, input_precision=PRECISION, out_dtype=SUM)
            dz = tl.where(hidden > 0, dz, 0.0)
            tl.store(z_grad + at, dz, mask=exists)
            weight2_sum = tl.dot(tl.trans(du.to(kind)), hidden, weight2_sum, input_precision=PRECISION, out_dtype=SUM)
            bias1_sum += tl.sum(dz, 0)
            bias2_sum += tl.sum(du, 0)
        tl.store(part + hidden_at + k * HIDDEN + unit, bias1_sum)
        tl.store(part + width + k * OUT + out, bias2_sum)
        at = part + width + SEEN * OUT + k * OUT * HIDDEN
        tl.store(at + out[:, None] * HIDDEN + unit[None, :], weight2_sum)
    else:
        bias_sum = tl.zeros((GATE_ROWS,), SUM)
        for start in range(begin, end, ROWS):
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            exists = (row < end)[:, None]
            at = row[:, None] * width + logit_at + gate[None, :]
            gates = softmax_rows(tl.load(z + at, mask=exists, other=0.0).to(SUM), SEEN, GATE_ROWS)
            dy = tl.load(grad + row[:, None] * OUT + out[None, :], mask=exists, other=0.0).to(SUM)
            reward = gates * 0.0
            for other in range(SEEN):
                v = tl.load(value + (row * SEEN + other)[:, None] * OUT + out[None, :], mask=exists, other=0.0)
                reward = tl.where(gate[None, :] == other, tl.sum(dy * v, 1)[:, None], reward)
            dl = gates * (reward - tl.sum(gates * reward, 1)[:, None])
            tl.store(z_grad + at, dl, mask=exists)
            bias_sum += tl.sum(dl, 0)
        tl.store(part + logit_at + gate, bias_sum)


def _first_layer(x: Tensor, weights: PackedWeights, shape: Shape, number: int) -> Tensor:
    block = shape.tower(number)
    return torch.addmm(weights.bias1[block], x.to(weights.first.dtype), weights.first[block].t())


def _places(shape: Shape, number: int) -> tuple[int, int, int]:
    return shape.expert(number).start, shape.gates(number).start, shape.hiddens(number).start


def _sizes(dtype: torch.dtype, shape: Shape) -> dict[str, object]:
    return {name: value for name, value in constants(dtype, shape).items() if name != "EXPERTS"}


def _mix(z: Tensor, weights: PackedWeights, shape: Shape, number: int, result: Tensor, value: Tensor | None) -> None:
    tiles = FORWARD[arithmetic(z.dtype)]
    if len(z):
        tail_forward_kernel[(triton.cdiv(len(z), tiles.rows),)](
            z,
            weights.weight2,
            weights.bias2,
            result,
            result if value is None else value,
            len(z),
            *_places(shape, number),
            **_sizes(z.dtype, shape),
            ROWS=tiles.rows,
            SAVE=value is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def _chunks(x: Tensor) -> Iterator[slice]:
    return (slice(at, at + SAVED_ROWS) for at in range(0, x.shape[0], SAVED_ROWS))


def tail_forward(
    user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, *, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """Vectors [users + items, K] in `user`'s dtype and, with `save`, what `tail_backward` reads."""
    result = user.new_empty(user.shape[0] + item.shape[0], shape.out)
    saved: list[Tensor] = []
    for number, (x, to) in enumerate(zip((user, item), result.split([user.shape[0], item.shape[0]]), strict=True)):
        keep = save and x.shape[0] <= SAVED_ROWS
        value = weights.first.new_empty(x.shape[0], shape.seen, shape.out) if keep else None
        for rows in _chunks(x):
            z = _first_layer(x[rows], weights, shape, number)
            _mix(z, weights, shape, number, to[rows], value)
            if value is not None:
                saved += [z, value]
        if value is not None and not x.shape[0]:
            saved += tail_saved(x, weights.first, shape)
    return result, saved


def tail_saved(x: Tensor, first: Tensor, shape: Shape) -> list[Tensor]:
    """Room for what is saved of a tower: first-layer outputs [rows, W] and values [rows, G, K]."""
    if x.shape[0] > SAVED_ROWS:
        return []
    return [first.new_empty(x.shape[0], shape.width), first.new_empty(x.shape[0], shape.seen, shape.out)]


def tail_backward(
    grad: Tensor, user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `first`, `bias1`, `weight2`, `bias2` for those of the vectors, `grad` [users + items, K]."""
    tiles = BACKWARD[arithmetic(weights.first.dtype)]
    kind = torch.promote_types(weights.first.dtype, torch.float32)
    tensors = (weights.first, weights.bias1, weights.weight2, weights.bias2)
    first_grad, bias1_grad, weight2_grad, bias2_grad = sums = tuple(
        torch.zeros_like(one, dtype=kind) for one in tensors
    )
    left = list(saved)
    for number, (x, dy) in enumerate(zip((user, item), grad.split([user.shape[0], item.shape[0]]), strict=True)):
        kept = (left.pop(0), left.pop(0)) if x.shape[0] <= SAVED_ROWS else None
        block, experts = shape.tower(number), shape.expert(number)
        for rows in _chunks(x):
            if kept is None:
                z = _first_layer(x[rows], weights, shape, number)
                value = z.new_empty(len(z), shape.seen, shape.out)
                _mix(z, weights, shape, number, z.new_empty(len(z), shape.out), value)
            else:
                z, value = kept
            chunk_rows = triton.cdiv(triton.cdiv(len(z), CHUNKS), tiles.rows) * tiles.rows
            chunks = triton.cdiv(len(z), chunk_rows)
            part = torch.empty(
                chunks, shape.width + shape.seen * shape.out * (1 + shape.hidden), dtype=kind, device=z.device
            )
            z_grad = torch.empty_like(z)
            tail_backward_kernel[(chunks, shape.seen + 1)](
                z,
                value,
                dy[rows],
                weights.weight2,
                z_grad,
                part,
                len(z),
                chunk_rows,
                *_places(shape, number),
                **_sizes(z.dtype, shape),
                ROWS=tiles.rows,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
            first_grad[block] += z_grad.t() @ x[rows].to(z.dtype)
            biases, second, weight = part.sum(0).split(
                [shape.width, shape.seen * shape.out, shape.seen * shape.out * shape.hidden]
            )
            bias1_grad[block] += biases
            bias2_grad[experts] += second.view(shape.seen, shape.out)
            weight2_grad[experts] += weight.view(shape.seen, shape.out, shape.hidden)
    first_grad, bias1_grad, weight2_grad, bias2_grad = (one.to(weights.first.dtype) for one in sums)
    return first_grad, bias1_grad, weight2_grad, bias2_grad
