"""Owns random problems for the adaptor's implementations, with their answers in float64 and the limits of errors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from kar_kernels import HybridExpertAdaptor, hybrid_expert_adaptor
from kar_kernels.layout import PackedWeights, Shape, pack
from kar_kernels.reference import Expert, hybrid_expert_reference
from kar_kernels_bench.rounding import INPUTS, Units, excesses, rounding_limits, rows_with_sure_signs

Result = dict[str, Tensor]
"""By name, all float64: vectors ("user", "item") and gradients ("gradient of " and a name of `INPUTS`)."""
Operator = Callable[..., tuple[Tensor, Tensor]]
PARAMETERS = INPUTS[2:]
CANDIDATES = 100
"""Rows drawn for each row that is kept, if a problem has only rows whose ReLUs have sure signs."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of an adaptor: D, H, K, S, P, the number of towers, and whether the towers share a gate."""

    dim: int = 50
    hidden: int = 32
    out: int = 7
    shared: int = 2
    dedicated: int = 5
    towers: int = 2
    one_gate: bool = False

    @property
    def seen(self) -> int:
        """Experts that a tower sees."""
        return self.shared + self.dedicated

    @property
    def experts(self) -> int:
        """All experts."""
        return self.shared + self.towers * self.dedicated

    def experts_of(self, tower: int) -> range:
        """The experts that a tower sees. An adaptor of one tower has the same for both."""
        start = self.dedicated if tower == 1 and self.towers == 2 else 0
        return range(start, start + self.seen)


@dataclass(frozen=True)
class Problem:
    """Raw weights, encodings and gradients of the vectors; all are float64, with values that `dtype` holds exactly."""

    sizes: Sizes
    dtype: torch.dtype
    x_dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    """In the order of `INPUTS`."""
    upstream: tuple[Tensor, Tensor]

    @property
    def rows(self) -> tuple[int, int]:
        """Users and items."""
        return len(self.inputs[0]), len(self.inputs[1])

    def leaves(self, x_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
        """The inputs in other dtypes, as leaves of autograd."""
        return [
            values.to(x_dtype if number < 2 else dtype).detach().clone().requires_grad_()
            for number, values in enumerate(self.inputs)
        ]

    def solve(self, operator: Operator, x_dtype: torch.dtype, dtype: torch.dtype) -> Result:
        """Vectors and all gradients that `operator(user, item, *parameters)` gives."""
        leaves = self.leaves(x_dtype, dtype)
        vectors = operator(*leaves)
        assert [out.dtype for out in vectors] == [x_dtype, x_dtype]
        gradients = torch.autograd.grad(
            vectors,
            leaves,
            [dy.to(x_dtype) for dy in self.upstream],
            materialize_grads=True,
            allow_unused=True,
        )
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert gradient.dtype == leaf.dtype
        result = dict(zip(("user", "item"), vectors, strict=True)) | {
            f"gradient of {name}": gradient for name, gradient in zip(INPUTS, gradients, strict=True)
        }
        return {name: values.detach().double() for name, values in result.items()}

    def loop(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The reference loop on the raw weights, which were never packed."""
        user, item, weight1, bias1, weight2, bias2, gate_weight, gate_bias = tensors
        vectors = []
        for tower, x in enumerate((user, item)):
            experts = [Expert(weight1[e], bias1[e], weight2[e], bias2[e]) for e in self.sizes.experts_of(tower)]
            gate = 0 if len(gate_weight) == 1 else tower
            out = hybrid_expert_reference(x.to(weight1.dtype), experts, gate_weight[gate], gate_bias[gate])
            vectors.append(out.to(user.dtype))
        return vectors[0], vectors[1]

    @cached_property
    def expected(self) -> Result:
        """The answer, in float64."""
        return self.solve(self.loop, torch.float64, torch.float64)

    def solve_by(self, path: str | None) -> Result:
        """Vectors and gradients of the operator by one implementation."""
        return self.solve(
            lambda user, item, *raw: hybrid_expert_adaptor(user, item, pack(*raw), path=path), self.x_dtype, self.dtype
        )

    def vectors_by(self, path: str | None) -> Result:
        """The operator's vectors without gradients."""
        user, item, *raw = (leaf.detach() for leaf in self.leaves(self.x_dtype, self.dtype))
        vectors = hybrid_expert_adaptor(user, item, pack(*raw), path=path)
        return {name: out.double() for name, out in zip(("user", "item"), vectors, strict=True)}

    def packed(self) -> tuple[Tensor, Tensor, PackedWeights, Shape]:
        """Encodings and weights as an implementation takes them."""
        user, item, *raw = (leaf.detach() for leaf in self.leaves(self.x_dtype, self.dtype))
        weights = pack(*raw)
        shape = Shape.of(weights.first, weights.weight2, weights.seen)
        padding = shape.dim - self.sizes.dim
        return F.pad(user, (0, padding)), F.pad(item, (0, padding)), weights, shape

    @property
    def packed_upstream(self) -> Tensor:
        """Gradients of both towers' vectors as an implementation takes them."""
        upstream = torch.cat(self.upstream).to(self.x_dtype)
        return F.pad(upstream, (0, self.packed()[3].out - self.sizes.out))

    def unpack_vectors(self, out: Tensor) -> Result:
        """Both towers' vectors, from the padded output of an implementation."""
        assert out.dtype == self.x_dtype
        users, items = out[:, : self.sizes.out].detach().double().split(self.rows)
        return {"user": users, "item": items}

    def unpack_gradients(self, gradients: Sequence[Tensor]) -> Result:
        """Gradients of the raw weights, from gradients of the packed weights."""
        raw = self.leaves(self.x_dtype, self.dtype)[2:]
        weights = pack(*raw)
        packed = (weights.first, weights.bias1, weights.weight2, weights.bias2)
        unpacked = torch.autograd.grad(packed, raw, gradients)
        return {f"gradient of {name}": gradient.double() for name, gradient in zip(PARAMETERS, unpacked, strict=True)}

    def limits(self, dtype: torch.dtype, x_dtype: torch.dtype, *, tf32: bool = False) -> Result:
        """The largest errors that rounding explains."""
        inputs = dict(zip(INPUTS, self.inputs, strict=True))
        return rounding_limits(inputs, self.upstream, Units.of(dtype, x_dtype, tf32=tf32))

    @cached_property
    def exact_limits(self) -> Result:
        """The largest errors in float64."""
        return self.limits(torch.float64, torch.float64)

    def assert_exact(self, result: Result) -> None:
        """Fail unless `result` is the answer to float64's precision."""
        assert excesses(result, self.expected, self.exact_limits) == []

    def assert_within_rounding(self, result: Result, *, tf32: bool = False) -> None:
        """Fail if an error is larger than rounding in the problem's dtypes explains."""
        assert excesses(result, self.expected, self.limits(self.dtype, self.x_dtype, tf32=tf32)) == []


def random_problem(
    generator: torch.Generator,
    users: int = 5,
    items: int = 19,
    dtype: torch.dtype = torch.float64,
    x_dtype: torch.dtype | None = None,
    gate_scale: float = 1.0,
    sure_signs: bool = False,
    **sizes: int,
) -> Problem:
    """A problem with normal numbers; keywords besides these are `Sizes`.

    With `sure_signs`, no argument of a ReLU is so near to 0 that it may round to another sign.
    """
    adaptor = Sizes(**sizes)
    x_dtype = x_dtype or dtype

    def normal(*shape: int, scale: float, rounded_to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(rounded_to).double()

    gates = 1 if adaptor.one_gate or adaptor.towers == 1 else 2
    experts, dim, hidden, out = adaptor.experts, adaptor.dim, adaptor.hidden, adaptor.out
    # Scaled so that no gate is near 0: if one expert had all the weight, errors of the others would stay hidden.
    raw = (
        normal(experts, hidden, dim, scale=dim**-0.5),
        normal(experts, hidden, scale=0.5),
        normal(experts, out, hidden, scale=(hidden / 2) ** -0.5),
        normal(experts, out, scale=0.5),
        normal(gates, adaptor.seen, dim, scale=dim**-0.5),
        normal(gates, adaptor.seen, scale=0.5 * gate_scale),
    )
    candidates = CANDIDATES if sure_signs else 1
    encodings = [normal(rows * candidates, dim, scale=1, rounded_to=x_dtype) for rows in (users, items)]
    if sure_signs:
        inputs = dict(zip(INPUTS, (*encodings, *raw), strict=True))
        sure = rows_with_sure_signs(inputs, Units.of(dtype, x_dtype, tf32=True))
        encodings = [x[keep][:rows] for x, keep, rows in zip(encodings, sure, (users, items), strict=True)]
        assert [len(x) for x in encodings] == [users, items]
    upstream = tuple(normal(rows, out, scale=1, rounded_to=x_dtype) for rows in (users, items))
    return Problem(adaptor, dtype, x_dtype, (*encodings, *raw), upstream)


def adaptor_excesses(
    adaptor: HybridExpertAdaptor,
    encodings: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Sequence[str]:
    """Errors of `vectors`, by tower, that rounding in `dtype` (by default the adaptor's) does not explain."""
    dtype = dtype or adaptor.weight1.dtype
    inputs = {name: adaptor.get_parameter(name).detach().double() for name in PARAMETERS}
    nothing = torch.zeros(0, adaptor.dim, dtype=torch.float64)
    if len(adaptor.towers) == 1:  # The operator then uses the adaptor's only tower for both.
        (x,) = encodings.values()
        inputs |= {"user": x.double(), "item": nothing}
        vectors = {"user": vectors[adaptor.towers[0]]}
    else:
        inputs |= {tower: encodings.get(tower, nothing).double() for tower in ("user", "item")}
    sizes = Sizes(adaptor.dim, adaptor.hidden, adaptor.out, adaptor.shared, adaptor.dedicated, len(adaptor.towers))
    upstream = tuple(inputs[tower].new_zeros(len(inputs[tower]), adaptor.out) for tower in ("user", "item"))
    problem = Problem(sizes, dtype, dtype, tuple(inputs[name] for name in INPUTS), upstream)
    result = {tower: out.detach().double() for tower, out in vectors.items()}
    x_dtype = next(iter(vectors.values())).dtype
    return excesses(result, problem.expected, problem.limits(dtype, x_dtype))
