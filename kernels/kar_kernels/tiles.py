"""Owns the parts that the kernels share: sizes of blocks, masked loads, the gates' softmax, the precision of dots.

Names of constants in every kernel: SEEN experts G of a tower, EXPERTS of both; BLOCK_HIDDEN, BLOCK_OUT and BLOCK_GATES,
the padded H, K and G, which a block always holds whole; BLOCK_ROWS and BLOCK_DIM, the rows and the columns of D that it
holds at a time; SUM_DTYPE, in which sums are kept; PRECISION of the dots of float32.
"""

import os
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from kar_kernels.layout import Shape

__all__ = ["INTERPRETED", "USER", "Tiles", "arithmetic", "column_of", "constants", "load_tile", "softmax_rows"]

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors; decided when they are defined, at import."""
USER: Final = tl.constexpr(0)
"""The number of the users' tower; the items' is 1."""


class Tiles(NamedTuple):
    """BLOCK_ROWS and BLOCK_DIM of a program, its warps, and the stages of its software pipeline."""

    rows: int
    dim: int
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
    """Constants that every kernel is compiled for, for weights of a dtype."""
    kind = arithmetic(dtype)
    return {
        "EXPERTS": shape.experts,
        "SEEN": shape.seen,
        "BLOCK_HIDDEN": shape.hidden,
        "BLOCK_OUT": shape.out,
        "BLOCK_GATES": shape.gate_rows,
        "SUM_DTYPE": tl.float64 if kind == "double" else tl.float32,
        "PRECISION": "tf32x3" if kind == "tf32x3" and not INTERPRETED else "tf32",
    }


@triton.jit
def load_tile(matrix_ptr, stride, row, rows, column):
    """Elements of a row-major matrix at int64 `row` [M] and `column` [N]; 0 where `row` is not below `rows`."""
    return tl.load(matrix_ptr + row[:, None] * stride + column[None, :], mask=row[:, None] < rows, other=0.0)  # (M, N)


@triton.jit
def softmax_rows(logits, SEEN: tl.constexpr, BLOCK_GATES: tl.constexpr):
    """Gates [M, BLOCK_GATES] of logits; 0 in the padding."""
    column = tl.arange(0, BLOCK_GATES)[None, :]
    logits = tl.where(column < SEEN, logits, float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def column_of(matrix, k, COLUMNS: tl.constexpr):
    """Column k [M] of a matrix [M, COLUMNS] in registers."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == k, matrix, 0.0), 1)
