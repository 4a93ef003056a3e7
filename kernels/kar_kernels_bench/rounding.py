"""Owns how far a correct implementation may be from float64: limits from the arithmetic, not from a measurement.

Model: the rounding errors of one number are independent, have mean 0, and each has a known bound (Higham and Mary, "A
New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019). Let b_i be the bounds of the
errors that reach a number. Its error then exceeds CONFIDENCE sqrt(sum b_i^2) with a probability below
2 exp(-CONFIDENCE^2 / 2), by Hoeffding's inequality. `Bounded.square` is sum b_i^2, computed in float64 from the
operands themselves, for every number of every result, by first-order propagation:

    adding n products p_i to a total s       sum_unit^2 n (sum p_i^2 + s^2)
    multiplying them in less than float32    product_unit^2 sum p_i^2
    storing s                                ROUNDINGS storage_unit^2 (s^2 + sum p_i^2)
    operands that are inexact                sum of coefficient^2 x their square

A partial sum is taken to be as large as a random walk of the products, so the order of the additions does not matter.
A ReLU whose argument is nearer to 0 than its own limit may be open or closed. The bound of what passes through it
backward then includes the whole of it.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["CONFIDENCE", "INPUTS", "Units", "excesses", "rounding_limits", "rows_with_sure_signs", "with_sure_signs"]

CONFIDENCE: Final = 6.0
"""Roots of the summed squared bounds that an error may reach. Chance exceeds it for 3 numbers in 10^8 if every single
rounding error is as large as it can be, and for 1 in 10^23 if rounding errors are uniform."""
ROUNDINGS: Final = 3
"""Times that an implementation may round to the storage dtype on its way to one number: product, bias, result."""
EXPONENTIAL_UNITS: Final = 4
"""Relative error of exp(x) divided by (1 + |x|), in units of the sums' dtype."""

VANISHING: Final = 1e-100
"""An error of which the square, or a product of it with other squares, may be below float64's smallest number."""

INPUTS: Final = ("user", "item", "weight1", "bias1", "weight2", "bias2", "gate_weight", "gate_bias")
"""Encodings [rows, D] of both towers and the weights, in the layout of `kar_kernels.adaptor.HybridExpertAdaptor`."""


class Bounded(NamedTuple):
    """Exact numbers in float64 and, of the same shape, the squared bounds of an implementation's errors."""

    value: Tensor
    square: Tensor

    @property
    def limit(self) -> Tensor:
        """The largest error of a correct implementation."""
        return CONFIDENCE * self.square.sqrt() + VANISHING

    @property
    def mT(self) -> "Bounded":
        """Transposed."""
        return Bounded(self.value.mT, self.square.mT)

    def sign(self) -> tuple[Tensor, Tensor]:
        """Where the number is above 0, and where an implementation may see another sign."""
        return self.value > 0, self.value.abs() <= self.limit

    def relu(self) -> "Bounded":
        """ReLU of the numbers."""
        above, unsure = self.sign()
        return Bounded(self.value.clamp_min(0), self.square * (above | unsure))

    def behind(self, argument: "Bounded") -> "Bounded":
        """A gradient behind the ReLU of `argument`: all of it is in doubt where the argument's sign is."""
        above, unsure = argument.sign()
        return Bounded(self.value * above, self.square * (above | unsure) + self.value.square() * unsure)


class Units(NamedTuple):
    """Relative errors of one operation, and the dtypes that they come from."""

    dtype: torch.dtype
    """Of weights and of all that is stored between encodings and vectors."""
    storage: float
    encoding: float
    """Of the encodings' dtype, which the vectors and the encodings' gradients have."""
    sum: float
    product: float

    @staticmethod
    def of(dtype: torch.dtype, x_dtype: torch.dtype | None = None, *, tf32: bool = False) -> "Units":
        """The units for weights of `dtype` and encodings of `x_dtype`, by default the same.

        Sums are float32, or float64 for float64. A tensor core truncates a sum, so its unit is a whole place instead of
        half of one. A product in float32 may be three TF32 products without the product of both remainders, or with
        `tf32` a single one, whose operands are truncated to 10 bits.
        """
        sum_dtype = torch.promote_types(dtype, torch.float32)
        product = (2.0**-9 if tf32 else 2.0**-20) if dtype == torch.float32 else 0.0
        return Units(dtype, _unit(dtype), _unit(x_dtype or dtype), torch.finfo(sum_dtype).eps, product)

    def operand(self, exact: Tensor) -> Bounded:
        """Numbers that an implementation may round to the storage dtype before it multiplies them."""
        return Bounded(exact, (exact - exact.to(self.dtype).double()).square())

    def stored(self, number: Bounded, terms: Tensor | float = 0.0) -> Bounded:
        """The same number as it is stored; `terms` is the sum of its squared summands."""
        info = torch.finfo(self.dtype)
        rounding = self.storage**2 * (number.value.square() + terms) + (info.smallest_normal * info.eps) ** 2
        return Bounded(number.value, number.square + ROUNDINGS * rounding)

    def product_of(self, left: Bounded, right: Bounded, bias: Tensor | float = 0.0) -> Bounded:
        """The matrix product `left` [..., n, k] x `right` [..., k, m] + `bias`, [..., n, m], as it is stored."""
        value = left.value @ right.value + bias
        terms = left.value.square() @ right.value.square() + bias**2
        adding = self.sum**2 * left.value.shape[-1] * (terms + value.square())
        inherited = left.square @ right.value.square() + left.value.square() @ right.square
        return self.stored(Bounded(value, adding + inherited + self.product**2 * terms), terms)


def _unit(dtype: torch.dtype) -> float:
    """Half a place, or a whole one for float64: the answer that float64 is compared with is rounded in it too."""
    return torch.finfo(dtype).eps / (1 if dtype == torch.float64 else 2)


def _exact(value: Tensor) -> Bounded:
    return Bounded(value, torch.zeros_like(value))


class Tower(NamedTuple):
    """One tower's operands in float64, experts in gate order, and which experts and gate of the adaptor they are."""

    x: Tensor  # (rows, D)
    experts: slice
    gate: int
    weight1: Tensor  # (G, H, D)
    bias1: Tensor  # (G, H)
    weight2: Tensor  # (G, K, H)
    bias2: Tensor  # (G, K)
    gate_weight: Tensor  # (G, D)
    gate_bias: Tensor  # (G)


class Forward(NamedTuple):
    """A tower's numbers: sums before each ReLU, logits, gates and vectors."""

    x: Bounded  # (rows, D)
    first: Bounded  # (G, rows, H)
    second: Bounded  # (G, rows, K)
    logits: Bounded  # (rows, G)
    gates: Bounded  # (rows, G)
    vectors: Bounded  # (rows, K)


def _towers(inputs: Mapping[str, Tensor]) -> list[Tower]:
    operands = {name: inputs[name].detach().double() for name in INPUTS}
    (gates, seen, _), experts = operands["gate_weight"].shape, len(operands["weight1"])
    towers = []
    for number, name in enumerate(INPUTS[:2]):
        own = slice(0, seen) if number == 0 else slice(experts - seen, experts)
        gate = min(number, gates - 1)
        towers.append(
            Tower(
                operands[name],
                own,
                gate,
                operands["weight1"][own],
                operands["bias1"][own],
                operands["weight2"][own],
                operands["bias2"][own],
                operands["gate_weight"][gate],
                operands["gate_bias"][gate],
            )
        )
    return towers


def _forward(tower: Tower, units: Units) -> Forward:
    x = units.operand(tower.x)
    first = units.product_of(x, _exact(tower.weight1.mT), tower.bias1.unsqueeze(1))
    second = units.product_of(first.relu(), _exact(tower.weight2.mT), tower.bias2.unsqueeze(1))
    logits = units.product_of(x, _exact(tower.gate_weight.mT), tower.gate_bias)
    below = logits.value - logits.value.amax(1, keepdim=True)
    exponential = (EXPONENTIAL_UNITS * units.sum * (1 + below.abs())).square()
    logits = Bounded(logits.value, logits.square + exponential)
    gate = torch.softmax(logits.value, 1)
    # A gate's error is g_k (e_k - sum_j g_j e_j), where e are the logits' errors.
    spread = (logits.square * gate.square()).sum(1, keepdim=True)
    gates = units.stored(Bounded(gate, gate.square() * (logits.square * (1 - 2 * gate) + spread)))
    # The vector's is sum_k g_k (v_k - out) e_k, and g_k times the errors of v_k.
    values = second.relu()
    weights = gate.mT.unsqueeze(2)  # (G, rows, 1)
    out = (weights * values.value).sum(0)
    by_logits = (weights.square() * (values.value - out).square() * logits.square.mT.unsqueeze(2)).sum(0)
    terms = (weights * values.value).square().sum(0)
    adding = (units.storage**2 * (ROUNDINGS + len(weights)) + units.encoding**2) * (terms + out.square())
    square = by_logits + (weights.square() * values.square).sum(0) + adding
    return Forward(x, first, second, logits, gates, units.stored(Bounded(out, square)))


def _backward(tower: Tower, forward: Forward, upstream: Tensor, units: Units) -> dict[str, Bounded]:
    """The tower's gradients by the names of `INPUTS`, the encodings' as "x"."""
    dy, gate, values = units.operand(upstream.double()), forward.gates.value, forward.second.relu()
    weights = gate.mT.unsqueeze(2)  # (G, rows, 1)
    through = Bounded(
        dy.value * weights,
        dy.value.square() * forward.gates.square.mT.unsqueeze(2) + dy.square * weights.square(),
    )
    du = units.stored(through, through.value.square()).behind(forward.second)  # (G, rows, K)
    dz = units.product_of(du, _exact(tower.weight2)).behind(forward.first)  # (G, rows, H)
    dl = _logit_gradient(dy, values, forward, units)  # (rows, G)
    ones = _exact(tower.x.new_ones(len(tower.x), 1))  # (rows, 1)
    hidden = forward.first.relu()
    own = units.product_of(dz, _exact(tower.weight1))  # (G, rows, D)
    gates = units.product_of(dl, _exact(tower.gate_weight))  # (rows, D)
    parts = torch.cat([own.value, gates.value.unsqueeze(0)])
    x = parts.sum(0)
    adding = (units.storage**2 * len(parts) + units.encoding**2) * (parts.square().sum(0) + x.square())
    return {
        "x": Bounded(x, own.square.sum(0) + gates.square + adding),
        "weight1": units.product_of(dz.mT, forward.x),
        "bias1": Bounded(*(part.squeeze(-1) for part in units.product_of(dz.mT, ones))),
        "weight2": units.product_of(du.mT, hidden),
        "bias2": Bounded(*(part.squeeze(-1) for part in units.product_of(du.mT, ones))),
        "gate_weight": units.product_of(dl.mT, forward.x),
        "gate_bias": Bounded(*(part.squeeze(-1) for part in units.product_of(dl.mT, ones))),
    }


def _logit_gradient(dy: Bounded, values: Bounded, forward: Forward, units: Units) -> Bounded:
    """dl_k = g_k (a_k - sum_j g_j a_j) [rows, G], where a_k = <dy, v_k>."""
    gate, logits = forward.gates.value, forward.logits
    terms = (dy.value * values.value).square().sum(2).mT
    inherited = (dy.value.square() * values.square + dy.square * values.value.square()).sum(2).mT
    reward = (dy.value * values.value).sum(2).mT  # (rows, G)
    adding = units.sum**2 * dy.value.shape[1] * (terms + reward.square())
    rewards = units.stored(Bounded(reward, inherited + adding), terms)
    mean = (gate * reward).sum(1, keepdim=True)
    apart = reward - mean
    # The gates' errors reach dl_k twice, by its own factor and by the mean: (a + b)^2 <= 2 a^2 + 2 b^2.
    by_gates = 2 * forward.gates.square * apart.square()
    by_mean = 2 * ((gate * apart).square() * logits.square).sum(1, keepdim=True)
    by_rewards = rewards.square * (1 - 2 * gate) + (gate.square() * rewards.square).sum(1, keepdim=True)
    products = (gate * reward).square().sum(1, keepdim=True)
    rounding = (units.sum**2 * gate.shape[1] + units.storage**2 * ROUNDINGS) * (
        products + reward.square() + mean.square()
    )
    square = by_gates + gate.square() * (by_mean + by_rewards + rounding)
    return units.stored(Bounded(gate * apart, square))


def rounding_limits(inputs: Mapping[str, Tensor], upstream: tuple[Tensor, Tensor], units: Units) -> dict[str, Tensor]:
    """The largest error of every number that a correct implementation computes, float64.

    Args:
        inputs: Encodings and weights by the names of `INPUTS`, with the values that the implementation gets.
        upstream: Gradients [rows, K] of both towers' vectors.
        units: The implementation's arithmetic.

    Returns:
        "user" and "item", [rows, K], and "gradient of " each of `INPUTS`, of its shape.
    """
    limits: dict[str, Tensor] = {}
    towers = _towers(inputs)
    total = {name: _exact(torch.zeros_like(inputs[name], dtype=torch.float64)) for name in INPUTS[2:]}
    for name, tower, dy in zip(INPUTS[:2], towers, upstream, strict=True):
        forward = _forward(tower, units)
        limits[name] = forward.vectors.limit
        gradients = _backward(tower, forward, dy, units)
        limits[f"gradient of {name}"] = gradients.pop("x").limit
        for parameter, gradient in gradients.items():
            own = tower.gate if parameter.startswith("gate") else tower.experts
            total[parameter].value[own] += gradient.value
            # Both towers' parts of a shared expert are stored, then their sum.
            total[parameter].square[own] += gradient.square + units.storage**2 * gradient.value.square()
    for parameter, gradient in total.items():
        limits[f"gradient of {parameter}"] = units.stored(gradient).limit
    return limits


def rows_with_sure_signs(inputs: Mapping[str, Tensor], units: Units) -> tuple[Tensor, Tensor]:
    """Which rows of both towers, [rows] bool, have no ReLU whose argument may round to another sign."""
    sure = []
    for tower in _towers(inputs):
        forward = _forward(tower, units)
        sure.append(~(forward.first.sign()[1].any(2).any(0) | forward.second.sign()[1].any(2).any(0)))
    return sure[0], sure[1]


def with_sure_signs(
    inputs: Mapping[str, Tensor], upstream: tuple[Tensor, Tensor], units: Units
) -> tuple[Tensor, Tensor]:
    """`upstream` with 0 where the value of an expert may round to 0 or not.

    A gradient that flows through such a value would need a limit as large as itself.
    """
    sure = []
    for tower, dy in zip(_towers(inputs), upstream, strict=True):
        unsure = _forward(tower, units).second.sign()[1].any(0)  # (rows, K)
        sure.append(dy.masked_fill(unsure, 0.0))
    return sure[0], sure[1]


def excesses(results: Mapping[str, Tensor], exact: Mapping[str, Tensor], limits: Mapping[str, Tensor]) -> Sequence[str]:
    """What is wrong with `results`, a sentence each; empty if every number is within its limit."""
    wrong = []
    for name, result in results.items():
        error = (result.double() - exact[name]).abs()
        over = ~(error <= limits[name])  # True for NaN
        if over.any():
            worst = torch.where(over, error / limits[name], 0.0).nan_to_num(nan=torch.inf).argmax()
            text = f"{name} is {error.flatten()[worst]:.2e} from float64, more than {limits[name].flatten()[worst]:.2e}"
            wrong.append(f"{text} ({int(over.sum())} of {over.numel()} numbers)")
    return wrong
