"""Owns the forms that benchmarks compare: the loop over experts, concatenated weights, both compiled, our paths.

Every form takes user and item encodings and gives both towers' vectors, from weights of the encodings' dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kar_kernels.adaptor import HybridExpertAdaptor, Tower
from kar_kernels.dispatch import KERNELS, Path
from kar_kernels.operator import hybrid_expert_adaptor

__all__ = ["BASELINES", "COMPILED", "KERNELS", "Form", "OnRow", "baseline", "dtype_name", "form", "operator_form"]

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
OnRow = Callable[[str], None]
"""Called with a text about the next step of a benchmark."""
BASELINES: Final = ("eager", "compiled", "concatenated", "compiled concatenated")
COMPILED: Final = ("compiled", "compiled concatenated")


@dataclass(frozen=True, slots=True)
class Form:
    """An implementation with its weights: `run(user, item)` gives ([Nu, K], [Ni, K]); `parameters` get gradients."""

    name: str
    run: Run
    parameters: Sequence[nn.Parameter]


def baseline(name: str, adaptor: HybridExpertAdaptor) -> Form:
    """One of `BASELINES`.

    The concatenated form is what a careful engineer writes without kernels: one product for all first layers of a
    tower, one batched product for all second layers, no copy of weights.
    """
    run = _loop(adaptor) if "concatenated" not in name else _concatenated(adaptor)
    if name in COMPILED:
        # Every batch size has its own code, as for a server that is warmed up with the sizes it will see; the limit on
        # recompilations must not turn the comparison into one with the eager form.
        torch._dynamo.config.recompile_limit = 256
        run = torch.compile(run, fullgraph=True, dynamic=False)
    return Form(name, run, list(_used(adaptor)))


def operator_form(path: Path, adaptor: HybridExpertAdaptor, *, train: bool = False) -> Form:
    """The product's operator on one path; weights packed once, or with every call where they are trained."""
    if train:
        return Form(path, lambda u, i: hybrid_expert_adaptor(u, i, adaptor.packed(), path=path), list(_used(adaptor)))
    weights = adaptor.packed().to(adaptor.weight1.dtype)
    return Form(path, lambda u, i: hybrid_expert_adaptor(u, i, weights, path=path), [])


def form(name: str, adaptor: HybridExpertAdaptor, *, train: bool = False) -> Form:
    """A baseline or a path of the operator."""
    return baseline(name, adaptor) if name in BASELINES else operator_form(cast(Path, name), adaptor, train=train)


def _used(adaptor: HybridExpertAdaptor) -> Sequence[nn.Parameter]:
    return [parameter for name, parameter in adaptor.named_parameters() if not name.endswith("neutral")]


def _loop(adaptor: HybridExpertAdaptor) -> Run:
    """`kar_kernels.reference` as one writes it with `nn.Linear`: bias in the product, one sum at the end."""

    def tower(x: Tensor, tower: Tower, number: int) -> Tensor:
        gates = torch.softmax(F.linear(x, adaptor.gate_weight[number], adaptor.gate_bias[number]), dim=-1)
        values = []
        for expert in adaptor.experts(tower):
            hidden = torch.relu(F.linear(x, expert.weight1, expert.bias1))
            values.append(torch.relu(F.linear(hidden, expert.weight2, expert.bias2)))
        return torch.bmm(gates.unsqueeze(1), torch.stack(values, 1)).squeeze(1)

    return lambda user, item: (tower(user, "user", 0), tower(item, "item", 1))


def _concatenated(adaptor: HybridExpertAdaptor) -> Run:
    def tower(x: Tensor, start: int, number: int) -> Tensor:
        at = slice(start, start + adaptor.shared + adaptor.dedicated)
        gates = torch.softmax(F.linear(x, adaptor.gate_weight[number], adaptor.gate_bias[number]), dim=-1)
        first = F.linear(x, adaptor.weight1[at].flatten(0, 1), adaptor.bias1[at].flatten())
        hidden = torch.relu(first).unflatten(1, (-1, adaptor.hidden)).transpose(0, 1)
        weight2, bias2 = adaptor.weight2[at], adaptor.bias2[at]
        second = torch.baddbmm(bias2.unsqueeze(1), hidden, weight2.transpose(1, 2))
        return (torch.relu(second) * gates.t().unsqueeze(2)).sum(0)

    return lambda user, item: (tower(user, 0, 0), tower(item, adaptor.dedicated, 1))


def dtype_name(dtype: torch.dtype) -> str:
    """As torch names it, without the module."""
    return str(dtype).removeprefix("torch.")
