"""Owns the operator `kar::hybrid_expert_adaptor`: one adaptor, several implementations, for eager and compiled torch.

The two operators below are opaque to `torch.compile`: `kar_kernels.dispatch` chooses the implementation when they run.
The forward saves a list of tensors for the backward; each implementation has its own.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from kar_kernels import cpu, eager
from kar_kernels.dispatch import Path, Request, choose
from kar_kernels.layout import STEP, PackedWeights, Shape

__all__ = ["hybrid_expert_adaptor"]

ALIGNMENT_BYTES: Final = 16


def hybrid_expert_adaptor(
    user: Tensor, item: Tensor, weights: PackedWeights, *, path: Request | None = None
) -> tuple[Tensor, Tensor]:
    """Knowledge vectors of both towers in one call; formula and source in `kar_kernels.reference`.

    Args:
        user: [Nu, D] encodings, of any float dtype; computed in the weights'.
        item: [Ni, D], of the same dtype; either may have no rows.
        weights: Made by `pack`; where gradients are wanted, from parameters.
        path: The implementation; None: chosen (`kar_kernels.dispatch`).

    Returns:
        [Nu, K] and [Ni, K] in the encodings' dtype. Differentiable once, to weights and encodings.

    Raises:
        ValueError: sizes do not fit.
        ImplementationError: `path`, or KAR_ADAPTOR, cannot run here.
    """
    shape = weights.shape
    user, item = _rows(user, shape, weights.dim), _rows(item, shape, weights.dim)
    tensors = (weights.first, weights.bias1, weights.weight2, weights.bias2)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (user, item, *tensors))
    # Calling a custom operator through torch takes 0.1 ms, as long as all the rest of a request of one user.
    if save or torch.compiler.is_compiling():
        out, _ = _forward(user, item, *tensors, weights.seen, path or "", save)
    else:
        out, _ = _run(user, item, weights, shape, path or "", save)
    if shape.out != weights.out:
        out = out[:, : weights.out]
    first, second = out.split([user.shape[0], item.shape[0]])
    return first, second


def _rows(x: Tensor, shape: Shape, dim: int) -> Tensor:
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(f"encodings are {list(x.shape)}: this adaptor takes [rows, {dim}]")
    return F.pad(x, (0, shape.dim - dim)) if shape.dim != dim else x


def _aligned(x: Tensor) -> Tensor:
    """The rows so aligned that 16 bytes at a time can be copied, and that Triton compiles for no second alignment."""
    fits = x.stride(1) == 1 and x.stride(0) % STEP == 0 and x.data_ptr() % ALIGNMENT_BYTES == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _weights(first: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, seen: int) -> PackedWeights:
    """Packed weights from their tensors; `dim` and `out` are the padded sizes, which callers pad to and cut off."""
    return PackedWeights(first, bias1, weight2, bias2, seen, first.shape[1], weight2.shape[1])


def _path(path: str, first: Tensor, shape: Shape, rows: int, save: bool) -> Path:
    return choose(first.device, first.dtype, shape, rows, training=save, requested=path).path


def _run(
    user: Tensor, item: Tensor, weights: PackedWeights, shape: Shape, path: str, save: bool
) -> tuple[Tensor, list[Tensor]]:
    rows = user.shape[0] + item.shape[0]
    chosen = _path(path, weights.first, shape, rows, save)
    if chosen == "cpu":
        return cpu.cpu_forward(user, item, weights, shape, save=save)
    if chosen == "eager" or not rows:
        return eager.eager_forward(user, item, weights, shape), _saved(user, item, weights.first, shape, chosen, save)
    from kar_kernels import fused_expert_pairs, fused_per_expert, gemm_then_fused  # an optional extra: triton

    with torch.cuda.device_of(weights.first):  # Triton launches on the current device.
        if chosen == "gemm_then_fused":
            return gemm_then_fused.gemm_then_fused_forward(user, item, weights, shape, save=save)
        user, item = _aligned(user), _aligned(item)
        if chosen == "fused_expert_pairs":
            return fused_expert_pairs.fused_expert_pairs_forward(user, item, weights, shape), []
        return fused_per_expert.fused_per_expert_forward(user, item, weights, shape, save=save)


@torch.library.custom_op("kar::hybrid_expert_adaptor", mutates_args=())
def _forward(
    user: Tensor,
    item: Tensor,
    first: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    seen: int,
    path: str,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    weights = _weights(first, bias1, weight2, bias2, seen)
    return _run(user, item, weights, weights.shape, path, save)


def _saved(user: Tensor, item: Tensor, first: Tensor, shape: Shape, path: Path, save: bool) -> list[Tensor]:
    if not save or path == "eager":
        return []
    if path == "cpu":
        return cpu.cpu_saved(user, item, first, shape)
    from kar_kernels import fused_per_expert, gemm_then_fused

    if path == "fused_per_expert":
        return fused_per_expert.fused_per_expert_saved(user, item, first, shape)
    return [saved for x in (user, item) for saved in gemm_then_fused.gemm_then_fused_saved(x, first, shape)]


@_forward.register_fake
def _forward_fake(
    user: Tensor,
    item: Tensor,
    first: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    seen: int,
    path: str,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    shape = Shape.of(first, weight2, seen)
    rows = user.shape[0] + item.shape[0]
    chosen = _path(path, first, shape, rows, save)
    return user.new_empty(rows, shape.out), _saved(user, item, first, shape, chosen, save)


@torch.library.custom_op("kar::hybrid_expert_adaptor_backward", mutates_args=())
def _backward(
    grad: Tensor,
    user: Tensor,
    item: Tensor,
    first: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    saved: Sequence[Tensor],
    seen: int,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = _weights(first, bias1, weight2, bias2, seen)
    shape = weights.shape
    rows = user.shape[0] + item.shape[0]
    chosen = _path(path, first, shape, rows, True)
    kept, grad = list(saved), grad.contiguous()
    if chosen == "cpu":
        return cpu.cpu_backward(grad, user, item, weights, shape, kept)
    if chosen == "eager" or not rows:
        return eager.eager_backward(grad, user, item, weights, shape)
    from kar_kernels import fused_per_expert, gemm_then_fused

    with torch.cuda.device_of(first):
        if chosen == "gemm_then_fused":
            return gemm_then_fused.gemm_then_fused_backward(grad, user, item, weights, shape, kept)
        return fused_per_expert.fused_per_expert_backward(grad, _aligned(user), _aligned(item), weights, shape, kept)


@_backward.register_fake
def _backward_fake(
    grad: Tensor,
    user: Tensor,
    item: Tensor,
    first: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    saved: Sequence[Tensor],
    seen: int,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(first), torch.empty_like(bias1), torch.empty_like(weight2), torch.empty_like(bias2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    *tensors, seen, path, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1])
    ctx.seen, ctx.path = seen, path


def _gradients(ctx: Any, grad: Tensor, _: list[Tensor]) -> tuple[Tensor | None, ...]:
    user, item, first, bias1, weight2, bias2, *saved = ctx.saved_tensors
    weights = _weights(first, bias1, weight2, bias2, ctx.seen)
    shape = weights.shape
    inputs = [
        eager.input_gradient(dy, x, weights, shape, number) if needed else None
        for number, (x, dy, needed) in enumerate(
            zip((user, item), grad.split([user.shape[0], item.shape[0]]), ctx.needs_input_grad, strict=False)
        )
    ]
    return (
        *inputs,
        *_backward(grad, user, item, first, bias1, weight2, bias2, saved, ctx.seen, ctx.path),
        None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)
