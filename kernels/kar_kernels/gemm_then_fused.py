"""Owns the kernel `gemm_then_fused`: first layers and gate of a tower as one library GEMM, one kernel for the rest.

Formula, of Xi et al. (RecSys 2024, arXiv 2306.10933), for a tower's row x and its experts k:

    g = softmax(G x + c),  h_k = ReLU(W1_k x + b1_k),  v_k = ReLU(W2_k h_k + b2_k),  out = sum_k g_k v_k

Forward. The GEMM writes z = W x + b [rows, W], with the gate's logits among its columns. A program (row block) reads
its rows of z once and does all that follows.

Backward. Program (chunk of rows, expert k or gate) turns z and the gradient dy of out into dz, as
`kar_kernels.fused_per_expert` does, and writes it where the first layer's gradient is one GEMM a tower. It also writes
its chunk's part of dW2_k and of the biases; one sum over chunks ends it. z of more than `SAVED_ROWS` rows is not saved:
the backward computes it again, a chunk at a time.
"""

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kar_kernels.layout import PackedWeights, Shape
from kar_kernels.tiles import Tiles, arithmetic, column_of, constants, softmax_rows

__all__ = [
    "BACKWARD",
    "FORWARD",
    "SAVED_ROWS",
    "gemm_then_fused_backward",
    "gemm_then_fused_forward",
    "gemm_then_fused_saved",
]

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
def gemm_then_fused_forward_kernel(
    z_ptr,
    weight2_ptr,
    bias2_ptr,
    result_ptr,
    value_ptr,
    rows,
    first_expert,
    logit_column,
    hidden_column,
    SEEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Grid (row blocks of one tower). Writes result [rows, OUT] and, with SAVE, value [rows, SEEN, OUT].

    The logits begin at column `logit_column` of z, the experts' first layers at `hidden_column`.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # (rows,)
    exists = (row < rows)[:, None]
    hidden_offset = tl.arange(0, BLOCK_HIDDEN)
    gate_offset = tl.arange(0, BLOCK_GATES)
    out_offset = tl.arange(0, BLOCK_OUT)
    z_row_ptr = z_ptr + row[:, None] * (BLOCK_GATES + SEEN * BLOCK_HIDDEN)
    logits = tl.load(z_row_ptr + logit_column + gate_offset[None, :], mask=exists, other=0.0).to(SUM_DTYPE)
    gates = softmax_rows(logits, SEEN, BLOCK_GATES)  # (rows, gates)
    result = tl.zeros((BLOCK_ROWS, BLOCK_OUT), SUM_DTYPE)
    for k in range(SEEN):
        hidden = tl.load(
            z_row_ptr + hidden_column + k * BLOCK_HIDDEN + hidden_offset[None, :], mask=exists, other=0.0
        )  # (rows, hidden)
        expert = first_expert + k
        w2 = tl.load(weight2_ptr + (expert * BLOCK_OUT + out_offset[None, :]) * BLOCK_HIDDEN + hidden_offset[:, None])
        hidden = tl.maximum(hidden, 0.0).to(w2.dtype)
        v = tl.dot(hidden, w2, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, out)
        v = tl.maximum(v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :], 0.0)
        result += v * column_of(gates, k, BLOCK_GATES)[:, None]
        if SAVE:
            tl.store(value_ptr + (row * SEEN + k)[:, None] * BLOCK_OUT + out_offset[None, :], v, mask=exists)
    tl.store(result_ptr + row[:, None] * BLOCK_OUT + out_offset[None, :], result, mask=exists)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "first_expert"])
def gemm_then_fused_backward_kernel(
    z_ptr,
    value_ptr,
    grad_ptr,
    weight2_ptr,
    z_grad_ptr,
    part_ptr,
    rows,
    chunk_rows,
    first_expert,
    logit_column,
    hidden_column,
    SEEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid (chunks of rows of one tower; SEEN, then its gate).

    Writes z_grad [rows, W] and part [chunks, W + SEEN * OUT + SEEN * OUT * HIDDEN]: gradients of the tower's first
    biases, in its columns' order, of its second biases and of its second weights.
    """
    chunk, k = tl.program_id(0), tl.program_id(1)
    hidden_offset = tl.arange(0, BLOCK_HIDDEN)
    gate_offset = tl.arange(0, BLOCK_GATES)
    out_offset = tl.arange(0, BLOCK_OUT)
    width: tl.constexpr = BLOCK_GATES + SEEN * BLOCK_HIDDEN
    part_ptr += chunk.to(tl.int64) * (width + SEEN * BLOCK_OUT * (1 + BLOCK_HIDDEN))
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    dtype = weight2_ptr.dtype.element_ty
    if k < SEEN:
        expert = first_expert + k
        w2 = tl.load(weight2_ptr + (expert * BLOCK_OUT + out_offset[:, None]) * BLOCK_HIDDEN + hidden_offset[None, :])
        weight2_sum = tl.zeros((BLOCK_OUT, BLOCK_HIDDEN), SUM_DTYPE)
        bias1_sum = tl.zeros((BLOCK_HIDDEN,), SUM_DTYPE)
        bias2_sum = tl.zeros((BLOCK_OUT,), SUM_DTYPE)
        for start in range(begin, end, BLOCK_ROWS):
            row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            exists = (row < end)[:, None]
            logit_offset = row[:, None] * width + logit_column + gate_offset[None, :]
            logits = tl.load(z_ptr + logit_offset, mask=exists, other=0.0).to(SUM_DTYPE)  # (rows, gates)
            gate = column_of(softmax_rows(logits, SEEN, BLOCK_GATES), k, BLOCK_GATES)  # (rows,)
            dy = tl.load(grad_ptr + row[:, None] * BLOCK_OUT + out_offset[None, :], mask=exists, other=0.0)
            dy = dy.to(SUM_DTYPE)  # (rows, out)
            v = tl.load(
                value_ptr + (row * SEEN + k)[:, None] * BLOCK_OUT + out_offset[None, :], mask=exists, other=0.0
            )  # (rows, out)
            z_offset = row[:, None] * width + hidden_column + k * BLOCK_HIDDEN + hidden_offset[None, :]
            hidden = tl.maximum(tl.load(z_ptr + z_offset, mask=exists, other=0.0), 0.0).to(dtype)  # (rows, hidden)
            du = tl.where(v > 0, dy * gate[:, None], 0.0)  # (rows, out)
            dz = tl.dot(du.to(dtype), w2, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, hidden)
            dz = tl.where(hidden > 0, dz, 0.0)
            tl.store(z_grad_ptr + z_offset, dz, mask=exists)
            weight2_sum = tl.dot(
                tl.trans(du.to(dtype)), hidden, weight2_sum, input_precision=PRECISION, out_dtype=SUM_DTYPE
            )  # (out, hidden)
            bias1_sum += tl.sum(dz, 0)  # (hidden,)
            bias2_sum += tl.sum(du, 0)  # (out,)
        tl.store(part_ptr + hidden_column + k * BLOCK_HIDDEN + hidden_offset, bias1_sum)
        tl.store(part_ptr + width + k * BLOCK_OUT + out_offset, bias2_sum)
        weight2_part_ptr = part_ptr + width + SEEN * BLOCK_OUT + k * BLOCK_OUT * BLOCK_HIDDEN
        tl.store(weight2_part_ptr + out_offset[:, None] * BLOCK_HIDDEN + hidden_offset[None, :], weight2_sum)
    else:
        bias_sum = tl.zeros((BLOCK_GATES,), SUM_DTYPE)
        for start in range(begin, end, BLOCK_ROWS):
            row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            exists = (row < end)[:, None]
            z_offset = row[:, None] * width + logit_column + gate_offset[None, :]
            logits = tl.load(z_ptr + z_offset, mask=exists, other=0.0).to(SUM_DTYPE)
            gates = softmax_rows(logits, SEEN, BLOCK_GATES)  # (rows, gates)
            dy = tl.load(grad_ptr + row[:, None] * BLOCK_OUT + out_offset[None, :], mask=exists, other=0.0)
            dy = dy.to(SUM_DTYPE)  # (rows, out)
            reward = gates * 0.0
            for other in range(SEEN):
                v = tl.load(
                    value_ptr + (row * SEEN + other)[:, None] * BLOCK_OUT + out_offset[None, :],
                    mask=exists,
                    other=0.0,
                )  # (rows, out)
                reward = tl.where(gate_offset[None, :] == other, tl.sum(dy * v, 1)[:, None], reward)
            dl = gates * (reward - tl.sum(gates * reward, 1)[:, None])  # (rows, gates)
            tl.store(z_grad_ptr + z_offset, dl, mask=exists)
            bias_sum += tl.sum(dl, 0)  # (gates,)
        tl.store(part_ptr + logit_column + gate_offset, bias_sum)


def _first_layer(x: Tensor, weights: PackedWeights, shape: Shape, tower: int) -> Tensor:
    block = shape.tower(tower)
    return torch.addmm(weights.bias1[block], x.to(weights.first.dtype), weights.first[block].t())


def _places(shape: Shape, tower: int) -> tuple[int, int, int]:
    """A tower's first expert, and the columns of its z where logits and first layers begin."""
    return shape.expert(tower).start, shape.gates(tower).start, shape.hiddens(tower).start


def _constants(dtype: torch.dtype, shape: Shape) -> dict[str, object]:
    return {name: value for name, value in constants(dtype, shape).items() if name != "EXPERTS"}


def _run_forward_kernel(
    z: Tensor, weights: PackedWeights, shape: Shape, tower: int, result: Tensor, value: Tensor | None
) -> None:
    tiles = FORWARD[arithmetic(z.dtype)]
    if len(z):
        gemm_then_fused_forward_kernel[(triton.cdiv(len(z), tiles.rows),)](
            z,
            weights.weight2,
            weights.bias2,
            result,
            result if value is None else value,
            len(z),
            *_places(shape, tower),
            **_constants(z.dtype, shape),
            BLOCK_ROWS=tiles.rows,
            SAVE=value is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def _chunks(x: Tensor) -> Iterator[slice]:
    return (slice(start, start + SAVED_ROWS) for start in range(0, x.shape[0], SAVED_ROWS))


def gemm_then_fused_forward(
    user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, *, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """Vectors [users + items, K] in `user`'s dtype and, with `save`, the tensors that the backward reads."""
    result = user.new_empty(user.shape[0] + item.shape[0], shape.out)
    saved: list[Tensor] = []
    for tower, (x, out) in enumerate(zip((user, item), result.split([user.shape[0], item.shape[0]]), strict=True)):
        keep = save and x.shape[0] <= SAVED_ROWS
        value = weights.first.new_empty(x.shape[0], shape.seen, shape.out) if keep else None
        for rows in _chunks(x):
            z = _first_layer(x[rows], weights, shape, tower)
            _run_forward_kernel(z, weights, shape, tower, out[rows], value)
            if value is not None:
                saved += [z, value]
        if value is not None and not x.shape[0]:
            saved += gemm_then_fused_saved(x, weights.first, shape)
    return result, saved


def gemm_then_fused_saved(x: Tensor, first: Tensor, shape: Shape) -> list[Tensor]:
    """Empty tensors like those saved of a tower: first-layer outputs [rows, W] and values [rows, G, K]."""
    if x.shape[0] > SAVED_ROWS:
        return []
    return [first.new_empty(x.shape[0], shape.width), first.new_empty(x.shape[0], shape.seen, shape.out)]


def gemm_then_fused_backward(
    grad: Tensor, user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `first`, `bias1`, `weight2`, `bias2` for the gradient `grad` [users + items, K] of the vectors."""
    tiles = BACKWARD[arithmetic(weights.first.dtype)]
    sum_dtype = torch.promote_types(weights.first.dtype, torch.float32)
    tensors = (weights.first, weights.bias1, weights.weight2, weights.bias2)
    first_grad, bias1_grad, weight2_grad, bias2_grad = sums = tuple(
        torch.zeros_like(tensor, dtype=sum_dtype) for tensor in tensors
    )
    remaining = list(saved)
    for tower, (x, dy) in enumerate(zip((user, item), grad.split([user.shape[0], item.shape[0]]), strict=True)):
        kept = (remaining.pop(0), remaining.pop(0)) if x.shape[0] <= SAVED_ROWS else None
        block, experts = shape.tower(tower), shape.expert(tower)
        for rows in _chunks(x):
            if kept is None:
                z = _first_layer(x[rows], weights, shape, tower)
                value = z.new_empty(len(z), shape.seen, shape.out)
                _run_forward_kernel(z, weights, shape, tower, z.new_empty(len(z), shape.out), value)
            else:
                z, value = kept
            chunk_rows = triton.cdiv(triton.cdiv(len(z), CHUNKS), tiles.rows) * tiles.rows
            chunks = triton.cdiv(len(z), chunk_rows)
            part = torch.empty(
                chunks, shape.width + shape.seen * shape.out * (1 + shape.hidden), dtype=sum_dtype, device=z.device
            )
            z_grad = torch.empty_like(z)
            gemm_then_fused_backward_kernel[(chunks, shape.seen + 1)](
                z,
                value,
                dy[rows],
                weights.weight2,
                z_grad,
                part,
                len(z),
                chunk_rows,
                *_places(shape, tower),
                **_constants(z.dtype, shape),
                BLOCK_ROWS=tiles.rows,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
            first_grad[block] += z_grad.t() @ x[rows].to(z.dtype)
            bias1_part, bias2_part, weight2_part = part.sum(0).split(
                [shape.width, shape.seen * shape.out, shape.seen * shape.out * shape.hidden]
            )
            bias1_grad[block] += bias1_part
            bias2_grad[experts] += bias2_part.view(shape.seen, shape.out)
            weight2_grad[experts] += weight2_part.view(shape.seen, shape.out, shape.hidden)
    first_grad, bias1_grad, weight2_grad, bias2_grad = (total.to(weights.first.dtype) for total in sums)
    return first_grad, bias1_grad, weight2_grad, bias2_grad
