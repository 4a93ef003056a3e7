"""Owns the implementation for processors: few, large matrix products by oneDNN, rows in chunks that stay in the cache.

All first layers of a tower are one product with ReLU fused into it, all second layers one batched product. torch's own
`linear` goes to MKL in float32, which on an AMD processor reaches less than half of oneDNN's speed with the same
AVX-512 instructions (docs/kernels.md); in bfloat16 both are oneDNN.
"""

from typing import Final

import torch
from torch import Tensor

from kar_kernels import eager
from kar_kernels.eager import Kept
from kar_kernels.layout import PackedWeights, Shape

__all__ = ["CHUNK_ROWS", "cpu_backward", "cpu_forward", "has_bfloat16"]

CHUNK_ROWS: Final = 2048
ONEDNN: Final = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""A linear layer with ReLU fused. Its name is not public, so a version of torch may lack it."""
ONEDNN_DTYPES: Final = (
    (torch.float32, torch.bfloat16)
    if ONEDNN is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else (torch.float32,)
)
"""Dtypes that oneDNN multiplies here: without AVX-512 it raises for bfloat16, which torch's own `linear` takes."""
NARROW: Final = 16
"""Outputs of a layer, below which MKL is as fast as oneDNN."""


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by AMX or AVX512-BF16; without, torch emulates it slowly."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """`eager.Linear` by oneDNN, where torch has it for this dtype.

    A gate's few outputs in float32 are left to MKL, which starts faster and is as fast.
    """
    narrow = x.dtype == torch.float32 and len(weight) < NARROW
    if ONEDNN is None or x.dtype not in ONEDNN_DTYPES or narrow or not x.shape[0]:
        return eager.linear(x, weight, bias, relu)
    out: Tensor = ONEDNN(x, weight, bias, "relu" if relu else "none", [], "")
    return out


def cpu_forward(
    user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, *, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """Vectors [users + items, K] in `user`'s dtype and, with `save`, the tensors that `cpu_backward` reads."""
    result = user.new_empty(user.shape[0] + item.shape[0], shape.out)
    saved: list[Tensor] = []
    for tower, (x, out) in enumerate(zip((user, item), result.split([user.shape[0], item.shape[0]]), strict=True)):
        if save:
            kept = eager.forward_kept(x, weights, shape, tower, linear)
            out.copy_(eager.mixed(kept))
            saved += kept
        else:
            for rows, part in zip(x.split(CHUNK_ROWS), out.split(CHUNK_ROWS), strict=True):
                part.copy_(eager.mixed(eager.forward_kept(rows, weights, shape, tower, linear)))
    return result, saved


def cpu_saved(user: Tensor, item: Tensor, first: Tensor, shape: Shape) -> list[Tensor]:
    """Empty tensors like those that `cpu_forward` saves of both towers."""
    wide = torch.promote_types(first.dtype, torch.float32)
    return [
        room
        for x in (user, item)
        for room in (
            first.new_empty(x.shape[0], shape.seen, dtype=wide),
            first.new_empty(x.shape[0], shape.seen * shape.hidden),
            first.new_empty(shape.seen, x.shape[0], shape.out),
        )
    ]


def cpu_backward(
    grad: Tensor, user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, saved: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `first`, `bias1`, `weight2`, `bias2` for the gradient `grad` [users + items, K] of the vectors."""
    kept = [Kept(*saved[start : start + 3]) if x.shape[0] else None for start, x in ((0, user), (3, item))]
    return eager.backward(grad, (user, item), (kept[0], kept[1]), weights, shape, linear)
