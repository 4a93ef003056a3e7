"""Owns what the Triton kernels share: a tile's sizes, masked loads, the gate's softmax, the precision of dots."""

import os
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from kar_kernels.layout import Shape

__all__ = ["INTERPRETED", "Tiles", "arithmetic", "column_of", "constants", "load_tile", "softmax_rows"]

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors; decided when they are defined, at import."""


class Tiles(NamedTuple):
    """Rows and columns of a program's tile, its warps, and the stages of its software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def arithmetic(dtype: torch.dtype) -> str:
    """How weights of a dtype are multiplied: "half", "tf32", "tf32x3" or "double"; sums are float32, or float64.

    Float32 dots use TF32 where torch may (`torch.set_float32_matmul_precision`), else three TF32 products, which keep
    float32 accuracy on tensor cores. The interpreter ignores the difference; "double" exists there alone.
    """
    if dtype == torch.float64:
        return "double"
    if dtype == torch.float32:
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "half"


def constants(dtype: torch.dtype, shape: Shape) -> dict[str, object]:
    """What every kernel is specialised for, of weights of a dtype."""
    kind = arithmetic(dtype)
    return {
        "EXPERTS": shape.experts,
        "SEEN": shape.seen,
        "HIDDEN": shape.hidden,
        "OUT": shape.out,
        "GATE_ROWS": shape.gate_rows,
        "SUM": tl.float64 if kind == "double" else tl.float32,
        "PRECISION": "tf32x3" if kind == "tf32x3" and not INTERPRETED else "tf32",
    }


@triton.jit
def load_tile(pointer, stride, row, rows, column):
    """[M, N] of a row-major matrix at int64 `row` [M] and `column` [N], which exist; 0 where `row` does not."""
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=row[:, None] < rows, other=0.0)


@triton.jit
def softmax_rows(logit, SEEN: tl.constexpr, GATE_ROWS: tl.constexpr):
    """Gates [M, GATE_ROWS] of logits; 0 in the padding."""
    column = tl.arange(0, GATE_ROWS)[None, :]
    logit = tl.where(column < SEEN, logit, float("-inf"))
    power = tl.exp(logit - tl.max(logit, 1)[:, None])
    return power / tl.sum(power, 1)[:, None]


@triton.jit
def column_of(matrix, k, COLUMNS: tl.constexpr):
    """Column k [M] of a matrix [M, COLUMNS] in registers."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == k, matrix, 0.0), 1)
