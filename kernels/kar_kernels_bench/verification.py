"""Owns the check that every kernel computes the adaptor: no number further from float64 than rounding explains."""

import torch
from torch import Tensor

from kar_kernels.adaptor import HybridExpertAdaptor
from kar_kernels_bench.cases import TINY_EXPERTS, has_form
from kar_kernels_bench.forms import KERNELS, Form, OnRow, baseline, dtype_name, operator_form
from kar_kernels_bench.rounding import INPUTS, Units, excesses, rounding_limits, with_sure_signs

__all__ = ["check"]


def check(device: torch.device, *, tiny: bool = False, on_row: OnRow = lambda text: None) -> list[str]:
    """Compare every kernel with float64: a sentence for each result that is wrong.

    No number may be further away than rounding explains (`kar_kernels_bench.rounding`).
    """
    dtypes = [torch.float32, torch.float16] + ([] if tiny else [torch.bfloat16])
    sizes = [(3, 5, 64)] if tiny else [(1, 100, 768), (58, 33, 50), (512, 512, 384), (0, 5000, 768), (700, 4500, 1024)]
    wrong = []
    for users, items, dim in sizes:
        for dtype in dtypes:
            torch.manual_seed(users + items + dim)
            adaptor = _adaptor(dim, tiny).to(device=device, dtype=dtype)
            exact = _adaptor(dim, tiny).to(device=device, dtype=torch.float64)
            exact.load_state_dict(adaptor.state_dict())
            x, dy = (_random_rows(users, items, size, dtype, device) for size in (dim, exact.out))
            form = baseline("eager", exact)
            inputs = dict(zip(INPUTS, (*x, *form.parameters), strict=True))
            units = Units.of(dtype, tf32=device.type == "cuda" and torch.get_float32_matmul_precision() != "highest")
            dy = with_sure_signs(inputs, dy, units)
            limits, truth = rounding_limits(inputs, dy, units), _results(form, x, dy)
            given, grad = ((users_part.to(dtype), items_part.to(dtype)) for users_part, items_part in (x, dy))
            for path in KERNELS:
                label = f"{path}, {users} + {items} rows, D = {dim}, {dtype_name(dtype)}"
                on_row(f"checking {label}")
                texts: list[str] = []
                if has_form(path, "backward", dtype, adaptor.packed().shape):
                    results = _results(operator_form(path, adaptor, train=True), given, grad)
                    texts += excesses(results, truth, limits)
                if has_form(path, "forward", dtype, adaptor.packed().shape):
                    with torch.no_grad():
                        vectors = dict(zip(INPUTS[:2], operator_form(path, adaptor).run(*given), strict=True))
                    texts += [f"without gradients, {text}" for text in excesses(vectors, truth, limits)]
                wrong += [f"{label}: {text}" for text in texts]
    return wrong


def _random_rows(users: int, items: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normal numbers [users, size] and [items, size] in float64, with values that `dtype` has."""
    user, item = (torch.randn(rows, size, device=device).to(dtype).double() for rows in (users, items))
    return user, item


def _adaptor(dim: int, tiny: bool) -> HybridExpertAdaptor:
    if tiny:
        return HybridExpertAdaptor(dim, shared=TINY_EXPERTS, dedicated=TINY_EXPERTS)
    return HybridExpertAdaptor(dim)


def _results(form: Form, x: tuple[Tensor, Tensor], dy: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Both towers' vectors and the weights' gradients, by the names of `kar_kernels_bench.rounding`."""
    vectors = form.run(*x)
    gradients = torch.autograd.grad(vectors, form.parameters, dy)
    return dict(zip(INPUTS[:2], (one.detach() for one in vectors), strict=True)) | {
        f"gradient of {name}": gradient for name, gradient in zip(INPUTS[2:], gradients, strict=True)
    }
