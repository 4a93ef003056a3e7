"""Owns the kernel `fused_expert_pairs`: the adaptor in one launch for very many rows, two experts at a time.

Formula, of Xi et al. (RecSys 2024, arXiv 2306.10933), for a tower's row x and its experts k:

    g = softmax(G x + c),  h_k = ReLU(W1_k x + b1_k),  v_k = ReLU(W2_k h_k + b2_k),  out = sum_k g_k v_k

The grid is as large as the chip; each program takes row block after row block. For a block it loops over D once for the
gate and expert 0, then once for each further two experts. x is thus read from memory once, and from the L2 cache
(G + 1) / 2 times. Hidden layers, gates and the sum over experts stay in registers; only K numbers a row leave the chip.

There is no backward: this kernel is for prestoring. Three TF32 products need more registers than there are for two
experts, so exact float32 goes to `kar_kernels.gemm_then_fused`.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kar_kernels.layout import PackedWeights, Shape
from kar_kernels.tiles import (
    INTERPRETED,
    USER,
    Tiles,
    arithmetic,
    column_of,
    constants,
    load_tile,
    softmax_rows,
)

__all__ = ["FORWARD", "fused_expert_pairs_forward"]

FORWARD: Final = {
    "half": Tiles(128, 64, 8, 3),
    "tf32": Tiles(128, 32, 8, 3),
    "double": Tiles(16, 32, 4, 1),
}
INTERPRETED_PROGRAMS: Final = 3
"""Programs that the interpreter is told to run at once."""


@triton.jit
def second_layer(
    hidden,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    expert,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Values [M, OUT] of an expert's first-layer sums `hidden` [M, HIDDEN]."""
    hidden_offset, out_offset = tl.arange(0, BLOCK_HIDDEN), tl.arange(0, BLOCK_OUT)
    hidden += tl.load(bias1_ptr + BLOCK_GATES + expert * BLOCK_HIDDEN + hidden_offset)[None, :]
    w2 = tl.load(weight2_ptr + (expert * BLOCK_OUT + out_offset[None, :]) * BLOCK_HIDDEN + hidden_offset[:, None])
    v = tl.dot(tl.maximum(hidden, 0.0).to(w2.dtype), w2, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, out)
    return tl.maximum(v + tl.load(bias2_ptr + expert * BLOCK_OUT + out_offset)[None, :], 0.0)


@triton.jit(do_not_specialize=["users", "items"])
def fused_expert_pairs_forward_kernel(
    user_ptr,
    item_ptr,
    first_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    result_ptr,
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
    """Grid (programs that run at once). Writes result [users + items, OUT]."""
    user_blocks = tl.cdiv(users, BLOCK_ROWS)
    blocks = user_blocks + tl.cdiv(items, BLOCK_ROWS)
    hidden_offset = tl.arange(0, BLOCK_HIDDEN)
    gate_offset = tl.arange(0, BLOCK_GATES)
    out_offset = tl.arange(0, BLOCK_OUT)
    packed_rows: tl.constexpr = 2 * BLOCK_GATES + EXPERTS * BLOCK_HIDDEN
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        tower = (block >= user_blocks).to(tl.int32)
        if tower == USER:
            x_ptr, stride, rows = user_ptr, user_stride, users
        else:
            x_ptr, stride, rows = item_ptr, item_stride, items
        row = ((block - tower * user_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # (rows,)
        expert = tower * (EXPERTS - SEEN)
        expert_row = BLOCK_GATES + expert * BLOCK_HIDDEN + hidden_offset
        gate_row = tower * (BLOCK_GATES + EXPERTS * BLOCK_HIDDEN) + gate_offset

        # The gate and expert 0.
        hidden = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), SUM_DTYPE)
        logits = tl.zeros((BLOCK_ROWS, BLOCK_GATES), SUM_DTYPE)
        for start in range(0, dim, BLOCK_DIM):
            column = start + tl.arange(0, BLOCK_DIM)
            x = load_tile(x_ptr, stride, row, rows, column).to(first_ptr.dtype.element_ty)  # (rows, dim)
            w1 = load_tile(first_ptr, dim, expert_row, packed_rows, column)  # (hidden, dim)
            wg = load_tile(first_ptr, dim, gate_row, packed_rows, column)  # (gates, dim)
            hidden = tl.dot(x, tl.trans(w1), hidden, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, hidden)
            logits = tl.dot(x, tl.trans(wg), logits, input_precision=PRECISION, out_dtype=SUM_DTYPE)  # (rows, gates)
        gates = softmax_rows(logits + tl.load(bias1_ptr + gate_row)[None, :], SEEN, BLOCK_GATES)  # (rows, gates)
        v = second_layer(
            hidden,
            bias1_ptr,
            weight2_ptr,
            bias2_ptr,
            expert,
            BLOCK_HIDDEN,
            BLOCK_OUT,
            BLOCK_GATES,
            SUM_DTYPE,
            PRECISION,
        )  # (rows, out)
        result = v * column_of(gates, 0, BLOCK_GATES)[:, None]  # (rows, out)

        # Two further experts at a time.
        for k in range(1, SEEN, 2):
            left = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), SUM_DTYPE)
            right = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), SUM_DTYPE)
            left_row = expert_row + k * BLOCK_HIDDEN
            # Of an even number of experts, the last has no partner: `right` is then the next rows' and is not used.
            right_row = left_row + BLOCK_HIDDEN
            for start in range(0, dim, BLOCK_DIM):
                column = start + tl.arange(0, BLOCK_DIM)
                x = load_tile(x_ptr, stride, row, rows, column).to(first_ptr.dtype.element_ty)  # (rows, dim)
                w_left = load_tile(first_ptr, dim, left_row, packed_rows, column)  # (hidden, dim)
                w_right = load_tile(first_ptr, dim, right_row, packed_rows, column)  # (hidden, dim)
                left = tl.dot(x, tl.trans(w_left), left, input_precision=PRECISION, out_dtype=SUM_DTYPE)
                right = tl.dot(x, tl.trans(w_right), right, input_precision=PRECISION, out_dtype=SUM_DTYPE)
            v = second_layer(
                left,
                bias1_ptr,
                weight2_ptr,
                bias2_ptr,
                expert + k,
                BLOCK_HIDDEN,
                BLOCK_OUT,
                BLOCK_GATES,
                SUM_DTYPE,
                PRECISION,
            )
            result += v * column_of(gates, k, BLOCK_GATES)[:, None]
            if k + 1 < SEEN:
                v = second_layer(
                    right,
                    bias1_ptr,
                    weight2_ptr,
                    bias2_ptr,
                    expert + k + 1,
                    BLOCK_HIDDEN,
                    BLOCK_OUT,
                    BLOCK_GATES,
                    SUM_DTYPE,
                    PRECISION,
                )
                result += v * column_of(gates, k + 1, BLOCK_GATES)[:, None]
        to_ptr = result_ptr + (tower * users + row)[:, None] * BLOCK_OUT + out_offset[None, :]
        tl.store(to_ptr, result, mask=(row < rows)[:, None])


def fused_expert_pairs_forward(user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape) -> Tensor:
    """Vectors [users + items, K] in `user`'s dtype."""
    tiles = FORWARD[arithmetic(weights.first.dtype)]
    result = user.new_empty(len(user) + len(item), shape.out)
    user, item = user.to(weights.first.dtype), item.to(weights.first.dtype)
    row_blocks = triton.cdiv(len(user), tiles.rows) + triton.cdiv(len(item), tiles.rows)
    if INTERPRETED:
        programs = INTERPRETED_PROGRAMS
    else:
        programs = torch.cuda.get_device_properties(user.device).multi_processor_count
    fused_expert_pairs_forward_kernel[(min(row_blocks, programs),)](
        user,
        item,
        weights.first,
        weights.bias1,
        weights.weight2,
        weights.bias2,
        result,
        len(user),
        len(item),
        user.stride(0),
        item.stride(0),
        shape.dim,
        **constants(weights.first.dtype, shape),
        BLOCK_ROWS=tiles.rows,
        BLOCK_DIM=tiles.dim,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return result
