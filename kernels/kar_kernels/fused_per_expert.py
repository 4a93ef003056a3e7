"""Owns the kernel `fused_per_expert`: the adaptor in one launch for few rows, and its backward in one launch.

Formula, of Xi et al. (RecSys 2024, arXiv 2306.10933), for a tower's row x and its experts k:

    g = softmax(G x + c),  h_k = ReLU(W1_k x + b1_k),  v_k = ReLU(W2_k h_k + b2_k),  out = sum_k g_k v_k

Forward. Program (row block, expert k) loops over D once, with two tensor-core dots a step: the expert's 128 columns of
W1 and the 16 of the gate, which every program computes for itself. h_k never leaves the registers. It writes
partial[k] = g_k v_k in float32, and a second, tiny launch adds the partials in gate order: no atomics, so results
repeat bit for bit. The row blocks of both towers are one grid. With few rows, the axis of experts fills the
chip: 601 rows are 11 row blocks, but 77 programs.

Backward. Let dy be the gradient of out. Program (block of D, expert e or gate t) loops over the rows of all towers that
see e:

    du = [v > 0] g dy,          dz = [h > 0] W2_e^T du,     dW1_e += dz^T x
    a_k = <dy, v_k>,            dl = g (a - <g, a>),        dG_t  += dl^T x

and one more column of programs takes dW2_e += du^T h and the biases. Recomputing dz for each block of D costs
K / (K + BLOCK_DIM) of the arithmetic. It saves a launch, and writing and reading dz.

Numbers of rows are arguments for which Triton must not compile anew where they are 1, or a multiple of 16: a server
would compile in the middle of a request, with the first batch of another size.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kar_kernels.layout import PackedWeights, Shape
from kar_kernels.tiles import USER, Tiles, arithmetic, column_of, constants, load_tile, softmax_rows

__all__ = [
    "BACKWARD",
    "FORWARD",
    "REDUCE_ROWS",
    "fused_per_expert_backward",
    "fused_per_expert_forward",
    "fused_per_expert_saved",
]

FORWARD: Final = {
    "half": Tiles(64, 64, 4, 3),
    "tf32": Tiles(64, 32, 4, 3),
    "tf32x3": Tiles(64, 32, 8, 3),
    "double": Tiles(16, 32, 4, 1),
}
BACKWARD: Final = {
    "half": Tiles(32, 64, 8, 2),
    "tf32": Tiles(32, 64, 8, 2),
    "tf32x3": Tiles(32, 64, 8, 2),
    "double": Tiles(16, 32, 4, 1),
}
REDUCE_ROWS: Final = 16


@triton.jit(do_not_specialize=["users", "items"])
def fused_per_expert_forward_kernel(
    user_ptr,
    item_ptr,
    first_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    partial_ptr,
    layer_ptr,
    value_ptr,
    users,
    items,
    user_stride,
    item_stride,
    dim,
    EXPERTS: tl.constexpr,
    SEEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Grid (row blocks of users, then of items; SEEN).

    Writes partial [SEEN, users + items, OUT]. With SAVE also layer [users + items, GATES + SEEN * HIDDEN], logits
    first, and value [users + items, SEEN, OUT].
    """
    # Which tower, which of its rows, which expert.
    block, k = tl.program_id(0), tl.program_id(1)
    user_blocks = tl.cdiv(users, BLOCK_ROWS)
    tower = (block >= user_blocks).to(tl.int32)
    if tower == USER:
        x_ptr, stride, rows = user_ptr, user_stride, users
    else:
        x_ptr, stride, rows = item_ptr, item_stride, items
    row = ((block - tower * user_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # (rows,)
    expert = tower * (EXPERTS - SEEN) + k

    # Their rows of the packed first layer.
    hidden_offset = tl.arange(0, BLOCK_HIDDEN)
    gate_offset = tl.arange(0, BLOCK_GATES)
    out_offset = tl.arange(0, BLOCK_OUT)
    expert_row = BLOCK_GATES + expert * BLOCK_HIDDEN + hidden_offset  # (hidden,)
    gate_row = tower * (BLOCK_GATES + EXPERTS * BLOCK_HIDDEN) + gate_offset  # (gates,)
    packed_rows = 2 * BLOCK_GATES + EXPERTS * BLOCK_HIDDEN

    # First layer and gate: one loop over D.
    hidden = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), SUM_DTYPE)
    logits = tl.zeros((BLOCK_ROWS, BLOCK_GATES), SUM_DTYPE)
    for start in range(0, dim, BLOCK_DIM):
        column = start + tl.arange(0, BLOCK_DIM)
        x = load_tile(x_ptr, stride, row, rows, column).to(first_ptr.dtype.element_ty)  # (rows, dim)
        w1 = load_tile(first_ptr, dim, expert_row, packed_rows, column)  # (hidden, dim)
        wg = load_tile(first_ptr, dim, gate_row, packed_rows, column)  # (gates, dim)
        hidden = tl.dot(x, tl.trans(w1), hidden, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, hidden)
        logits = tl.dot(x, tl.trans(wg), logits, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, gates)
    logits += tl.load(bias1_ptr + gate_row)[None, :]
    hidden = tl.maximum(hidden + tl.load(bias1_ptr + expert_row)[None, :], 0.0).to(first_ptr.dtype.element_ty)
    gates = softmax_rows(logits, SEEN, BLOCK_GATES)  # (rows, gates)

    # Second layer, from registers.
    w2 = tl.load(weight2_ptr + (expert * BLOCK_OUT + out_offset[None, :]) * BLOCK_HIDDEN + hidden_offset[:, None])
    v = tl.dot(hidden, w2, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, out)
    v = tl.maximum(v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :], 0.0)
    weighted = v * column_of(gates, k, BLOCK_GATES)[:, None]  # (rows, out)

    # Rows of the output: users', then items'.
    exists = (row < rows)[:, None]
    to = tower * users + row
    partial_row = k.to(tl.int64) * (users + items) + to
    tl.store(partial_ptr + partial_row[:, None] * BLOCK_OUT + out_offset[None, :], weighted, mask=exists)
    if SAVE:
        layer_row_ptr = layer_ptr + to[:, None] * (BLOCK_GATES + SEEN * BLOCK_HIDDEN)
        tl.store(layer_row_ptr + BLOCK_GATES + k * BLOCK_HIDDEN + hidden_offset[None, :], hidden, mask=exists)
        tl.store(value_ptr + (to * SEEN + k)[:, None] * BLOCK_OUT + out_offset[None, :], v, mask=exists)
        if k == 0:
            tl.store(layer_row_ptr + gate_offset[None, :], logits, mask=exists)


@triton.jit(do_not_specialize=["total"])
def fused_per_expert_reduce_kernel(
    partial_ptr, result_ptr, total, SEEN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Grid (row blocks): result [total, OUT] is the sum of partial [SEEN, total, OUT] in gate order."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    offset = row[:, None] * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]  # (rows, out)
    exists = (row < total)[:, None]
    result = tl.load(partial_ptr + offset, mask=exists)
    for k in range(1, SEEN):
        result += tl.load(partial_ptr + tl.cast(k, tl.int64) * total * BLOCK_OUT + offset, mask=exists)
    tl.store(result_ptr + offset, result, mask=exists)


@triton.jit
def expert_gradients(
    grad_ptr,
    w2,
    layer_ptr,
    value_ptr,
    tower,
    users,
    k,
    row,
    rows,
    SEEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """du [M, OUT], dz [M, HIDDEN] and h [M, HIDDEN] of a tower's expert k at `row` [M], 0 beyond `rows`."""
    hidden_offset = tl.arange(0, BLOCK_HIDDEN)
    gate_offset = tl.arange(0, BLOCK_GATES)
    out_offset = tl.arange(0, BLOCK_OUT)
    exists = (row < rows)[:, None]
    saved_row = tower * users + row
    layer_row_ptr = layer_ptr + saved_row[:, None] * (BLOCK_GATES + SEEN * BLOCK_HIDDEN)
    logits = tl.load(layer_row_ptr + gate_offset[None, :], mask=exists, other=0.0).to(SUM_DTYPE)  # (rows, gates)
    gate = column_of(softmax_rows(logits, SEEN, BLOCK_GATES), k, BLOCK_GATES)  # (rows,)
    dy = tl.load(grad_ptr + saved_row[:, None] * BLOCK_OUT + out_offset[None, :], mask=exists, other=0.0).to(SUM_DTYPE)
    v = tl.load(
        value_ptr + (saved_row * SEEN + k)[:, None] * BLOCK_OUT + out_offset[None, :], mask=exists, other=0.0
    )  # (rows, out)
    h = tl.load(
        layer_row_ptr + BLOCK_GATES + k * BLOCK_HIDDEN + hidden_offset[None, :], mask=exists, other=0.0
    )  # (rows, hidden)
    du = tl.where(v > 0, dy * gate[:, None], 0.0).to(w2.dtype)  # (rows, out)
    dz = tl.dot(du, w2, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, hidden)
    return du, tl.where(h > 0, dz, 0.0).to(w2.dtype), h


@triton.jit
def logit_gradients(
    grad_ptr,
    layer_ptr,
    value_ptr,
    tower,
    users,
    row,
    rows,
    SEEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
):
    """dl [M, GATES] of a tower at `row` [M], 0 beyond `rows`."""
    gate_offset, out_offset = tl.arange(0, BLOCK_GATES), tl.arange(0, BLOCK_OUT)
    exists = (row < rows)[:, None]
    saved_row = tower * users + row
    layer_row_ptr = layer_ptr + saved_row[:, None] * (BLOCK_GATES + SEEN * BLOCK_HIDDEN)
    logits = tl.load(layer_row_ptr + gate_offset[None, :], mask=exists, other=0.0)
    gates = softmax_rows(logits.to(SUM_DTYPE), SEEN, BLOCK_GATES)  # (rows, gates)
    dy = tl.load(grad_ptr + saved_row[:, None] * BLOCK_OUT + out_offset[None, :], mask=exists, other=0.0).to(SUM_DTYPE)
    reward = gates * 0.0
    for k in range(SEEN):
        v = tl.load(
            value_ptr + (saved_row * SEEN + k)[:, None] * BLOCK_OUT + out_offset[None, :], mask=exists, other=0.0
        )  # (rows, out)
        reward = tl.where(gate_offset[None, :] == k, tl.sum(dy * v, 1)[:, None], reward)
    return gates * (reward - tl.sum(gates * reward, 1)[:, None])  # (rows, gates)


@triton.jit(do_not_specialize=["users", "items"])
def fused_per_expert_backward_kernel(
    user_ptr,
    item_ptr,
    grad_ptr,
    weight2_ptr,
    layer_ptr,
    value_ptr,
    first_grad_ptr,
    bias1_grad_ptr,
    weight2_grad_ptr,
    bias2_grad_ptr,
    users,
    items,
    user_stride,
    item_stride,
    dim,
    EXPERTS: tl.constexpr,
    SEEN: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Grid (blocks of D, one more for small gradients; EXPERTS, then the two gates).

    Reads grad [users + items, OUT] and the tensors that the forward saved.
    """
    block, e = tl.program_id(0), tl.program_id(1)
    small = block == tl.cdiv(dim, BLOCK_DIM)
    column = block * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    hidden_offset = tl.arange(0, BLOCK_HIDDEN)
    gate_offset = tl.arange(0, BLOCK_GATES)
    out_offset = tl.arange(0, BLOCK_OUT)
    dtype = weight2_ptr.dtype.element_ty
    if e < EXPERTS:
        weight2_offset = (e * BLOCK_OUT + out_offset[:, None]) * BLOCK_HIDDEN + hidden_offset[None, :]
        w2 = tl.load(weight2_ptr + weight2_offset)  # (out, hidden)
        expert_row = BLOCK_GATES + e * BLOCK_HIDDEN + hidden_offset
        if small:
            # The second layer and both biases.
            weight2_sum = tl.zeros((BLOCK_OUT, BLOCK_HIDDEN), SUM_DTYPE)
            bias1_sum = tl.zeros((BLOCK_HIDDEN,), SUM_DTYPE)
            bias2_sum = tl.zeros((BLOCK_OUT,), SUM_DTYPE)
            for tower in tl.static_range(2):
                k = e - tower * (EXPERTS - SEEN)
                rows = tl.where((k >= 0) & (k < SEEN), users if tower == USER else items, 0)
                for start in range(0, rows, BLOCK_ROWS):
                    row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
                    du, dz, h = expert_gradients(
                        grad_ptr,
                        w2,
                        layer_ptr,
                        value_ptr,
                        tower,
                        users,
                        k,
                        row,
                        rows,
                        SEEN,
                        BLOCK_HIDDEN,
                        BLOCK_OUT,
                        BLOCK_GATES,
                        SUM_DTYPE,
                        PRECISION,
                    )
                    weight2_sum = tl.dot(
                        tl.trans(du), h, weight2_sum, input_precision=PRECISION, out_dtype=SUM_DTYPE
                    )  # (out, hidden)
                    bias1_sum += tl.sum(dz.to(SUM_DTYPE), 0)  # (hidden,)
                    bias2_sum += tl.sum(du.to(SUM_DTYPE), 0)  # (out,)
            tl.store(weight2_grad_ptr + weight2_offset, weight2_sum)
            tl.store(bias1_grad_ptr + expert_row, bias1_sum)
            tl.store(bias2_grad_ptr + e * BLOCK_OUT + out_offset, bias2_sum)
        else:
            # A block of columns of the first layer.
            first_sum = tl.zeros((BLOCK_HIDDEN, BLOCK_DIM), SUM_DTYPE)
            for tower in tl.static_range(2):
                x_ptr = user_ptr if tower == USER else item_ptr
                stride = user_stride if tower == USER else item_stride
                k = e - tower * (EXPERTS - SEEN)
                rows = tl.where((k >= 0) & (k < SEEN), users if tower == USER else items, 0)
                for start in range(0, rows, BLOCK_ROWS):
                    row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
                    du, dz, h = expert_gradients(
                        grad_ptr,
                        w2,
                        layer_ptr,
                        value_ptr,
                        tower,
                        users,
                        k,
                        row,
                        rows,
                        SEEN,
                        BLOCK_HIDDEN,
                        BLOCK_OUT,
                        BLOCK_GATES,
                        SUM_DTYPE,
                        PRECISION,
                    )
                    x = load_tile(x_ptr, stride, row, rows, column).to(dtype)  # (rows, dim)
                    first_sum = tl.dot(
                        tl.trans(dz), x, first_sum, input_precision=PRECISION, out_dtype=SUM_DTYPE
                    )  # (hidden, dim)
            tl.store(first_grad_ptr + expert_row[:, None] * dim + column[None, :], first_sum)
    else:
        tower = e - EXPERTS
        if tower == USER:
            x_ptr, stride, rows = user_ptr, user_stride, users
        else:
            x_ptr, stride, rows = item_ptr, item_stride, items
        gate_row = tower * (BLOCK_GATES + EXPERTS * BLOCK_HIDDEN) + gate_offset
        if small:
            # The gate's bias.
            bias_sum = tl.zeros((BLOCK_GATES,), SUM_DTYPE)
            for start in range(0, rows, BLOCK_ROWS):
                row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
                dl = logit_gradients(
                    grad_ptr,
                    layer_ptr,
                    value_ptr,
                    tower,
                    users,
                    row,
                    rows,
                    SEEN,
                    BLOCK_HIDDEN,
                    BLOCK_OUT,
                    BLOCK_GATES,
                    SUM_DTYPE,
                )
                bias_sum += tl.sum(dl, 0)  # (gates,)
            tl.store(bias1_grad_ptr + gate_row, bias_sum)
        else:
            # A block of columns of the gate.
            gate_sum = tl.zeros((BLOCK_GATES, BLOCK_DIM), SUM_DTYPE)
            for start in range(0, rows, BLOCK_ROWS):
                row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
                dl = logit_gradients(
                    grad_ptr,
                    layer_ptr,
                    value_ptr,
                    tower,
                    users,
                    row,
                    rows,
                    SEEN,
                    BLOCK_HIDDEN,
                    BLOCK_OUT,
                    BLOCK_GATES,
                    SUM_DTYPE,
                )
                x = load_tile(x_ptr, stride, row, rows, column).to(dtype)  # (rows, dim)
                gate_sum = tl.dot(
                    tl.trans(dl.to(dtype)), x, gate_sum, input_precision=PRECISION, out_dtype=SUM_DTYPE
                )  # (gates, dim)
            tl.store(first_grad_ptr + gate_row[:, None] * dim + column[None, :], gate_sum)


def fused_per_expert_forward(
    user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, *, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """Vectors [users + items, K] in `user`'s dtype and, with `save`, the tensors that the backward reads."""
    tiles = FORWARD[arithmetic(weights.first.dtype)]
    total = user.shape[0] + item.shape[0]
    partial = user.new_empty(
        shape.seen, total, shape.out, dtype=torch.promote_types(weights.first.dtype, torch.float32)
    )
    result = user.new_empty(total, shape.out)
    saved = fused_per_expert_saved(user, item, weights.first, shape) if save else []
    layer, value = saved or (partial, partial)
    if save:
        user, item = user.to(weights.first.dtype), item.to(weights.first.dtype)
    row_blocks = triton.cdiv(user.shape[0], tiles.rows) + triton.cdiv(item.shape[0], tiles.rows)
    fused_per_expert_forward_kernel[(row_blocks, shape.seen)](
        user,
        item,
        weights.first,
        weights.bias1,
        weights.weight2,
        weights.bias2,
        partial,
        layer,
        value,
        user.shape[0],
        item.shape[0],
        user.stride(0),
        item.stride(0),
        shape.dim,
        **constants(weights.first.dtype, shape),
        BLOCK_ROWS=tiles.rows,
        BLOCK_DIM=tiles.dim,
        SAVE=save,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    fused_per_expert_reduce_kernel[(triton.cdiv(total, REDUCE_ROWS),)](
        partial, result, total, SEEN=shape.seen, BLOCK_OUT=shape.out, BLOCK_ROWS=REDUCE_ROWS, num_warps=4
    )
    return result, saved


def fused_per_expert_saved(user: Tensor, item: Tensor, first: Tensor, shape: Shape) -> list[Tensor]:
    """Room for first-layer outputs [users + items, W], logits first, and values [users + items, G, K]."""
    total = user.shape[0] + item.shape[0]
    return [first.new_empty(total, shape.width), first.new_empty(total, shape.seen, shape.out)]


def fused_per_expert_backward(
    grad: Tensor, user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `first`, `bias1`, `weight2`, `bias2` for the gradient `grad` [users + items, K] of the vectors."""
    tiles = BACKWARD[arithmetic(weights.first.dtype)]
    layer, value = saved
    first_grad, bias1_grad, weight2_grad, bias2_grad = (
        torch.empty_like(packed) for packed in (weights.first, weights.bias1, weights.weight2, weights.bias2)
    )
    fused_per_expert_backward_kernel[(triton.cdiv(shape.dim, tiles.dim) + 1, shape.experts + 2)](
        user,
        item,
        grad,
        weights.weight2,
        layer,
        value,
        first_grad,
        bias1_grad,
        weight2_grad,
        bias2_grad,
        user.shape[0],
        item.shape[0],
        user.stride(0),
        item.stride(0),
        shape.dim,
        **constants(weights.first.dtype, shape),
        BLOCK_ROWS=tiles.rows,
        BLOCK_DIM=tiles.dim,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return first_grad, bias1_grad, weight2_grad, bias2_grad
