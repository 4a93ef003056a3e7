"""Owns `pair`: the adaptor in one launch for very many rows, two experts at a time. No backward: for prestoring.

Formula in `kar_kernels.reference`. The grid is as large as the chip; each program takes row tile after row tile. For a
tile it loops over D once for the gate and expert 0, then once for each further two experts, so that x is read from
memory once (and from the L2 cache (G + 1) / 2 times), and hidden layers, gates and the sum over experts stay in
registers. It writes K numbers a row, which is all that leaves the chip. Three TF32 products need more registers than
there are for two experts: exact float32 goes to `kar_kernels.tail`.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kar_kernels.layout import PackedWeights, Shape
from kar_kernels.tiles import INTERPRETED, Tiles, arithmetic, column_of, constants, load_tile, softmax_rows

__all__ = ["FORWARD", "pair_forward"]

FORWARD: Final = {
    "half": Tiles(128, 64, 8, 3),
    "tf32": Tiles(128, 32, 8, 3),
    "double": Tiles(16, 32, 4, 1),
}


@triton.jit
def second_layer(
    hidden,
    bias1,
    weight2,
    bias2,
    expert,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Values [M, OUT] of an expert's first-layer sums `hidden` [M, HIDDEN]."""
    unit, out = tl.arange(0, HIDDEN), tl.arange(0, OUT)
    hidden += tl.load(bias1 + GATE_ROWS + expert * HIDDEN + unit)[None, :]
    w2 = tl.load(weight2 + (expert * OUT + out[None, :]) * HIDDEN + unit[:, None])
    v = tl.dot(tl.maximum(hidden, 0.0).to(w2.dtype), w2, input_precision=PRECISION, out_dtype=SUM)
    return tl.maximum(v + tl.load(bias2 + expert * OUT + out)[None, :], 0.0)


@triton.jit(do_not_specialize=["users", "items"])
def pair_forward_kernel(
    user,
    item,
    first,
    bias1,
    weight2,
    bias2,
    result,
    users,
    items,
    user_stride,
    item_stride,
    dim,
    EXPERTS: tl.constexpr,
    SEEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (programs that run at once). Writes result [users + items, OUT]."""
    user_tiles = tl.cdiv(users, ROWS)
    tiles = user_tiles + tl.cdiv(items, ROWS)
    unit, gate, out = tl.arange(0, HIDDEN), tl.arange(0, GATE_ROWS), tl.arange(0, OUT)
    packed: tl.constexpr = 2 * GATE_ROWS + EXPERTS * HIDDEN
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tile < user_tiles:
            x, stride, rows, second = user, user_stride, users, tile * 0
        else:
            x, stride, rows, second = item, item_stride, items, tile * 0 + 1
        row = ((tile - second * user_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        expert = second * (EXPERTS - SEEN)
        expert_row = GATE_ROWS + expert * HIDDEN + unit
        gate_row = second * (GATE_ROWS + EXPERTS * HIDDEN) + gate
        hidden = tl.zeros((ROWS, HIDDEN), SUM)
        logit = tl.zeros((ROWS, GATE_ROWS), SUM)
        for at in range(0, dim, COLUMNS):
            column = at + tl.arange(0, COLUMNS)
            tile_x = load_tile(x, stride, row, rows, column).to(first.dtype.element_ty)
            tile_w = load_tile(first, dim, expert_row, packed, column)
            tile_g = load_tile(first, dim, gate_row, packed, column)
            hidden = tl.dot(tile_x, tl.trans(tile_w), hidden, input_precision=PRECISION, out_dtype=SUM)
            logit = tl.dot(tile_x, tl.trans(tile_g), logit, input_precision=PRECISION, out_dtype=SUM)
        gates = softmax_rows(logit + tl.load(bias1 + gate_row)[None, :], SEEN, GATE_ROWS)
        v = second_layer(hidden, bias1, weight2, bias2, expert, HIDDEN, OUT, GATE_ROWS, SUM, PRECISION)
        mixed = v * column_of(gates, 0, GATE_ROWS)[:, None]
        for k in range(1, SEEN, 2):
            left = tl.zeros((ROWS, HIDDEN), SUM)
            right = tl.zeros((ROWS, HIDDEN), SUM)
            left_row = expert_row + k * HIDDEN
            # The last pair of an even number of experts has one: what the other reads is the next block, with gate 0.
            right_row = left_row + HIDDEN
            for at in range(0, dim, COLUMNS):
                column = at + tl.arange(0, COLUMNS)
                tile_x = load_tile(x, stride, row, rows, column).to(first.dtype.element_ty)
                tile_l = load_tile(first, dim, left_row, packed, column)
                tile_r = load_tile(first, dim, right_row, packed, column)
                left = tl.dot(tile_x, tl.trans(tile_l), left, input_precision=PRECISION, out_dtype=SUM)
                right = tl.dot(tile_x, tl.trans(tile_r), right, input_precision=PRECISION, out_dtype=SUM)
            v = second_layer(left, bias1, weight2, bias2, expert + k, HIDDEN, OUT, GATE_ROWS, SUM, PRECISION)
            mixed += v * column_of(gates, k, GATE_ROWS)[:, None]
            if k + 1 < SEEN:
                v = second_layer(right, bias1, weight2, bias2, expert + k + 1, HIDDEN, OUT, GATE_ROWS, SUM, PRECISION)
                mixed += v * column_of(gates, k + 1, GATE_ROWS)[:, None]
        to = result + (second * users + row)[:, None] * OUT + out[None, :]
        tl.store(to, mixed, mask=(row < rows)[:, None])


def pair_forward(user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape) -> Tensor:
    """Vectors [users + items, K] in `user`'s dtype."""
    tiles = FORWARD[arithmetic(weights.first.dtype)]
    result = user.new_empty(len(user) + len(item), shape.out)
    user, item = user.to(weights.first.dtype), item.to(weights.first.dtype)
    row_tiles = triton.cdiv(len(user), tiles.rows) + triton.cdiv(len(item), tiles.rows)
    programs = 3 if INTERPRETED else torch.cuda.get_device_properties(user.device).multi_processor_count
    pair_forward_kernel[(min(row_tiles, programs),)](
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
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return result
