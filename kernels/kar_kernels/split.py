"""Owns `split`: the adaptor in one launch for few rows, and its backward in one launch.

Forward, formula in `kar_kernels.reference`. Program (row tile, expert k) computes for its rows

    g = softmax(G x + c)                    every program for itself: G is 16 columns beside the expert's 128
    h = ReLU(W1_k x + b1_k)                 one loop over D, two tensor-core dots a step
    v = ReLU(W2_k h + b2_k)                 h never leaves the registers
    partial[k] = g[k] v                     fp32

and a second, tiny launch sums the partials in gate order: no atomics, so results repeat bit for bit. The row tiles of
both towers are one grid. With few rows the expert axis is what fills the chip: 601 rows are 11 tiles, but 77 programs.

Backward. Program (tile of D, expert e or gate t) loops over the rows of the towers that see e:

    du = [v > 0] g dy,  dz = [h > 0] W2_e^T du,  dW1_e += dz^T x
    a_k = <dy, v_k>,  dl = g (a - <g, a>),       dG_t += dl^T x

and one more column of programs takes dW2_e += du^T h and the biases. Recomputing dz for each tile of D costs
K / (K + tile) of the work, and saves a launch and the bytes of a dz that is written and read.

Row counts are arguments that Triton must not compile anew for where they are 1, or a multiple of 16: a server would,
in the middle of a request, with the first batch of another size.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kar_kernels.layout import PackedWeights, Shape
from kar_kernels.tiles import Tiles, arithmetic, column_of, constants, load_tile, softmax_rows

__all__ = ["BACKWARD", "FORWARD", "split_backward", "split_forward"]

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
def split_forward_kernel(
    user,
    item,
    first,
    bias1,
    weight2,
    bias2,
    partial,
    layer,
    value,
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
    SAVE: tl.constexpr,
):
    """Grid (row tiles of users, then of items; SEEN).

    Writes partial [SEEN, users + items, OUT] and, with SAVE, layer [users + items, GATE_ROWS + SEEN * HIDDEN], logits
    first, and value [users + items, SEEN, OUT].
    """
    tile, k = tl.program_id(0), tl.program_id(1)
    user_tiles = tl.cdiv(users, ROWS)
    if tile < user_tiles:
        x, stride, rows, second = user, user_stride, users, tile * 0
    else:
        x, stride, rows, second = item, item_stride, items, tile * 0 + 1
    row = ((tile - second * user_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    expert = second * (EXPERTS - SEEN) + k
    unit, gate, out = tl.arange(0, HIDDEN), tl.arange(0, GATE_ROWS), tl.arange(0, OUT)
    expert_row = GATE_ROWS + expert * HIDDEN + unit
    gate_row = second * (GATE_ROWS + EXPERTS * HIDDEN) + gate
    packed = 2 * GATE_ROWS + EXPERTS * HIDDEN
    hidden = tl.zeros((ROWS, HIDDEN), SUM)
    logit = tl.zeros((ROWS, GATE_ROWS), SUM)
    for at in range(0, dim, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        tile_x = load_tile(x, stride, row, rows, column).to(first.dtype.element_ty)
        tile_w = load_tile(first, dim, expert_row, packed, column)
        tile_g = load_tile(first, dim, gate_row, packed, column)
        hidden = tl.dot(tile_x, tl.trans(tile_w), hidden, input_precision=PRECISION, out_dtype=SUM)
        logit = tl.dot(tile_x, tl.trans(tile_g), logit, input_precision=PRECISION, out_dtype=SUM)
    logit += tl.load(bias1 + gate_row)[None, :]
    hidden = tl.maximum(hidden + tl.load(bias1 + expert_row)[None, :], 0.0).to(first.dtype.element_ty)
    gates = softmax_rows(logit, SEEN, GATE_ROWS)
    w2 = tl.load(weight2 + (expert * OUT + out[None, :]) * HIDDEN + unit[:, None])
    v = tl.dot(hidden, w2, input_precision=PRECISION, out_dtype=SUM)
    v = tl.maximum(v + tl.load(bias2 + expert * OUT + out)[None, :], 0.0)
    mixed = v * column_of(gates, k, GATE_ROWS)[:, None]
    exists = (row < rows)[:, None]
    to = second * users + row
    tl.store(partial + (k.to(tl.int64) * (users + items) + to)[:, None] * OUT + out[None, :], mixed, mask=exists)
    if SAVE:
        line = layer + to[:, None] * (GATE_ROWS + SEEN * HIDDEN)
        tl.store(line + GATE_ROWS + k * HIDDEN + unit[None, :], hidden, mask=exists)
        tl.store(value + (to * SEEN + k)[:, None] * OUT + out[None, :], v, mask=exists)
        if k == 0:
            tl.store(line + gate[None, :], logit, mask=exists)


@triton.jit(do_not_specialize=["total"])
def split_reduce_kernel(partial, result, total, SEEN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr):
    """Grid (row tiles): result [total, OUT] is the sum of partial [SEEN, total, OUT] in gate order."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = row[:, None] * OUT + tl.arange(0, OUT)[None, :]
    exists = (row < total)[:, None]
    result_tile = tl.load(partial + at, mask=exists)
    for k in range(1, SEEN):
        result_tile += tl.load(partial + tl.cast(k, tl.int64) * total * OUT + at, mask=exists)
    tl.store(result + at, result_tile, mask=exists)


@triton.jit
def expert_rows(
    grad,
    weight2_tile,
    layer,
    value,
    second,
    users,
    k,
    row,
    rows,
    SEEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """du [M, OUT], dz [M, HIDDEN] and h [M, HIDDEN] of expert k of a tower at `row` [M], 0 beyond `rows`."""
    unit, gate, out = tl.arange(0, HIDDEN), tl.arange(0, GATE_ROWS), tl.arange(0, OUT)
    exists = (row < rows)[:, None]
    at = second * users + row
    line = layer + at[:, None] * (GATE_ROWS + SEEN * HIDDEN)
    logit = tl.load(line + gate[None, :], mask=exists, other=0.0).to(SUM)
    mine = column_of(softmax_rows(logit, SEEN, GATE_ROWS), k, GATE_ROWS)
    dy = tl.load(grad + at[:, None] * OUT + out[None, :], mask=exists, other=0.0).to(SUM)
    v = tl.load(value + (at * SEEN + k)[:, None] * OUT + out[None, :], mask=exists, other=0.0)
    h = tl.load(line + GATE_ROWS + k * HIDDEN + unit[None, :], mask=exists, other=0.0)
    du = tl.where(v > 0, dy * mine[:, None], 0.0).to(weight2_tile.dtype)
    dz = tl.dot(du, weight2_tile, input_precision=PRECISION, out_dtype=SUM)
    return du, tl.where(h > 0, dz, 0.0).to(weight2_tile.dtype), h


@triton.jit
def gate_rows(
    grad,
    layer,
    value,
    second,
    users,
    row,
    rows,
    SEEN: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    SUM: tl.constexpr,
):
    """dl [M, GATE_ROWS] of a tower at `row` [M], 0 beyond `rows`."""
    gate, out = tl.arange(0, GATE_ROWS), tl.arange(0, OUT)
    exists = (row < rows)[:, None]
    at = second * users + row
    logit = tl.load(layer + at[:, None] * (GATE_ROWS + SEEN * HIDDEN) + gate[None, :], mask=exists, other=0.0)
    gates = softmax_rows(logit.to(SUM), SEEN, GATE_ROWS)
    dy = tl.load(grad + at[:, None] * OUT + out[None, :], mask=exists, other=0.0).to(SUM)
    reward = gates * 0.0
    for k in range(SEEN):
        v = tl.load(value + (at * SEEN + k)[:, None] * OUT + out[None, :], mask=exists, other=0.0)
        reward = tl.where(gate[None, :] == k, tl.sum(dy * v, 1)[:, None], reward)
    return gates * (reward - tl.sum(gates * reward, 1)[:, None])


@triton.jit(do_not_specialize=["users", "items"])
def split_backward_kernel(
    user,
    item,
    grad,
    weight2,
    layer,
    value,
    first_grad,
    bias1_grad,
    weight2_grad,
    bias2_grad,
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
    """Grid (tiles of D, one more for small gradients; EXPERTS, then the two gates).

    Reads grad [users + items, OUT] and what the forward saved.
    """
    tile, e = tl.program_id(0), tl.program_id(1)
    small = tile == tl.cdiv(dim, COLUMNS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    unit, gate, out = tl.arange(0, HIDDEN), tl.arange(0, GATE_ROWS), tl.arange(0, OUT)
    kind = weight2.dtype.element_ty
    if e < EXPERTS:
        w2 = tl.load(weight2 + (e * OUT + out[:, None]) * HIDDEN + unit[None, :])
        expert_row = GATE_ROWS + e * HIDDEN + unit
        if small:
            weight2_sum = tl.zeros((OUT, HIDDEN), SUM)
            bias1_sum = tl.zeros((HIDDEN,), SUM)
            bias2_sum = tl.zeros((OUT,), SUM)
            for second in tl.static_range(2):
                k = e - second * (EXPERTS - SEEN)
                rows = tl.where((k >= 0) & (k < SEEN), users if second == 0 else items, 0)
                for start in range(0, rows, ROWS):
                    row = (start + tl.arange(0, ROWS)).to(tl.int64)
                    du, dz, h = expert_rows(
                        grad,
                        w2,
                        layer,
                        value,
                        second,
                        users,
                        k,
                        row,
                        rows,
                        SEEN,
                        HIDDEN,
                        OUT,
                        GATE_ROWS,
                        SUM,
                        PRECISION,
                    )
                    weight2_sum = tl.dot(tl.trans(du), h, weight2_sum, input_precision=PRECISION, out_dtype=SUM)
                    bias1_sum += tl.sum(dz.to(SUM), 0)
                    bias2_sum += tl.sum(du.to(SUM), 0)
            tl.store(weight2_grad + (e * OUT + out[:, None]) * HIDDEN + unit[None, :], weight2_sum)
            tl.store(bias1_grad + expert_row, bias1_sum)
            tl.store(bias2_grad + e * OUT + out, bias2_sum)
        else:
            first_sum = tl.zeros((HIDDEN, COLUMNS), SUM)
            for second in tl.static_range(2):
                x = user if second == 0 else item
                stride = user_stride if second == 0 else item_stride
                k = e - second * (EXPERTS - SEEN)
                rows = tl.where((k >= 0) & (k < SEEN), users if second == 0 else items, 0)
                for start in range(0, rows, ROWS):
                    row = (start + tl.arange(0, ROWS)).to(tl.int64)
                    du, dz, h = expert_rows(
                        grad,
                        w2,
                        layer,
                        value,
                        second,
                        users,
                        k,
                        row,
                        rows,
                        SEEN,
                        HIDDEN,
                        OUT,
                        GATE_ROWS,
                        SUM,
                        PRECISION,
                    )
                    tile_x = load_tile(x, stride, row, rows, column).to(kind)
                    first_sum = tl.dot(tl.trans(dz), tile_x, first_sum, input_precision=PRECISION, out_dtype=SUM)
            to = first_grad + expert_row[:, None] * dim + column[None, :]
            tl.store(to, first_sum)
    else:
        second = e - EXPERTS
        if second == 0:
            x, stride, rows = user, user_stride, users
        else:
            x, stride, rows = item, item_stride, items
        gate_row = second * (GATE_ROWS + EXPERTS * HIDDEN) + gate
        if small:
            bias_sum = tl.zeros((GATE_ROWS,), SUM)
            for start in range(0, rows, ROWS):
                row = (start + tl.arange(0, ROWS)).to(tl.int64)
                dl = gate_rows(grad, layer, value, second, users, row, rows, SEEN, HIDDEN, OUT, GATE_ROWS, SUM)
                bias_sum += tl.sum(dl, 0)
            tl.store(bias1_grad + gate_row, bias_sum)
        else:
            gate_sum = tl.zeros((GATE_ROWS, COLUMNS), SUM)
            for start in range(0, rows, ROWS):
                row = (start + tl.arange(0, ROWS)).to(tl.int64)
                dl = gate_rows(grad, layer, value, second, users, row, rows, SEEN, HIDDEN, OUT, GATE_ROWS, SUM)
                tile_x = load_tile(x, stride, row, rows, column).to(kind)
                gate_sum = tl.dot(tl.trans(dl.to(kind)), tile_x, gate_sum, input_precision=PRECISION, out_dtype=SUM)
            to = first_grad + gate_row[:, None] * dim + column[None, :]
            tl.store(to, gate_sum)


def split_forward(
    user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, *, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """Vectors [users + items, K] in `user`'s dtype and, with `save`, what `split_backward` reads."""
    tiles = FORWARD[arithmetic(weights.first.dtype)]
    total = user.shape[0] + item.shape[0]
    partial = user.new_empty(
        shape.seen, total, shape.out, dtype=torch.promote_types(weights.first.dtype, torch.float32)
    )
    result = user.new_empty(total, shape.out)
    saved = split_saved(user, item, weights.first, shape) if save else []
    layer, value = saved or (partial, partial)
    if save:
        user, item = user.to(weights.first.dtype), item.to(weights.first.dtype)
    row_tiles = triton.cdiv(user.shape[0], tiles.rows) + triton.cdiv(item.shape[0], tiles.rows)
    split_forward_kernel[(row_tiles, shape.seen)](
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
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        SAVE=save,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    split_reduce_kernel[(triton.cdiv(total, REDUCE_ROWS),)](
        partial, result, total, SEEN=shape.seen, OUT=shape.out, ROWS=REDUCE_ROWS, num_warps=4
    )
    return result, saved


def split_saved(user: Tensor, item: Tensor, first: Tensor, shape: Shape) -> list[Tensor]:
    """Room for first-layer outputs [users + items, W], logits first, and values [users + items, G, K]."""
    total = user.shape[0] + item.shape[0]
    return [first.new_empty(total, shape.width), first.new_empty(total, shape.seen, shape.out)]


def split_backward(
    grad: Tensor, user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `first`, `bias1`, `weight2`, `bias2` for those of the vectors, `grad` [users + items, K]."""
    tiles = BACKWARD[arithmetic(weights.first.dtype)]
    layer, value = saved
    first_grad, bias1_grad, weight2_grad, bias2_grad = (
        torch.empty_like(one) for one in (weights.first, weights.bias1, weights.weight2, weights.bias2)
    )
    split_backward_kernel[(triton.cdiv(shape.dim, tiles.columns) + 1, shape.experts + 2)](
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
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return first_grad, bias1_grad, weight2_grad, bias2_grad
