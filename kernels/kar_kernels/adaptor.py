"""Owns the hybrid-expert adaptor as a module: weights, neutral vectors, its safetensors file.

Formula and source: `kar_kernels.reference`. `kar_kernels.operator` computes it. Experts lie in memory as
[user's P | shared S | item's P], so that the S + P experts of either tower are one contiguous slice. An adaptor of one
tower has that tower's experts and gate only.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, cast, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kar_kernels.cpu import has_bfloat16
from kar_kernels.dispatch import Choice, choose
from kar_kernels.layout import PackedWeights, pack
from kar_kernels.operator import hybrid_expert_adaptor
from kar_kernels.reference import Expert

__all__ = ["PRECISIONS", "TOWERS", "Encoded", "FrozenAdaptor", "HybridExpertAdaptor", "Precision", "Tower"]

Tower = Literal["user", "item"]
TOWERS: Final[tuple[Tower, ...]] = get_args(Tower)
Precision = Literal["float32", "bfloat16"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)
Encoded = Mapping[Tower, tuple[Tensor, Tensor]]
"""Encodings [B, D] of each tower, and which of them are present, [B] bool."""
NO_TOWER: Final = "this adaptor has no {} tower: train one with it"
FORMAT: Final = "kar.hybrid_expert_adaptor/1"
FORMATS: Final[Mapping[Precision, str]] = {"float32": FORMAT, "bfloat16": f"{FORMAT} bfloat16"}
"""The file's only metadata: safetensors writes several in random order, and a release's id is the hash of its files."""


class HybridExpertAdaptor(nn.Module):
    """Compresses text encodings of users and items to knowledge vectors.

    Args:
        dim: Components D of an encoding.
        hidden: Width H of an expert's first layer.
        out: Components K of a knowledge vector.
        shared: Experts S that both towers share. `shared=1, dedicated=0` is one plain MLP.
        dedicated: Experts P of each tower alone.
        towers: The kinds of entities it adapts, in the order of `TOWERS`.
        one_gate: Whether all towers share a gate; with `dedicated=0` they are then one mixture of experts.

    Example:
        >>> adaptor = HybridExpertAdaptor(dim=384)
        >>> user, item = adaptor(torch.randn(1, 384), torch.randn(500, 384))
        >>> user.shape, item.shape
        (torch.Size([1, 32]), torch.Size([500, 32]))
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int = 128,
        out: int = 32,
        shared: int = 2,
        dedicated: int = 5,
        towers: Sequence[Tower] = TOWERS,
        one_gate: bool = False,
    ) -> None:
        super().__init__()
        if min(dim, hidden, out) < 1 or min(shared, dedicated) < 0 or shared + dedicated < 1:
            raise ValueError("an adaptor needs positive sizes and at least one expert a tower")
        if not towers or any(tower not in TOWERS for tower in towers):
            raise ValueError(f"an adaptor needs one or both towers of {TOWERS}, not {tuple(towers)}")
        self.dim, self.hidden, self.out, self.shared, self.dedicated = dim, hidden, out, shared, dedicated
        self.towers = tuple(tower for tower in TOWERS if tower in towers)
        self.one_gate = one_gate
        self.precision: Precision = "float32"
        experts, seen = shared + len(self.towers) * dedicated, shared + dedicated
        gates = 1 if one_gate else len(self.towers)
        self.weight1 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.bias1 = nn.Parameter(torch.empty(experts, hidden))
        self.weight2 = nn.Parameter(torch.empty(experts, out, hidden))
        self.bias2 = nn.Parameter(torch.empty(experts, out))
        self.gate_weight = nn.Parameter(torch.empty(gates, seen, dim))
        self.gate_bias = nn.Parameter(torch.empty(gates, seen))
        for tower in self.towers:
            self.register_parameter(f"{tower}_neutral", nn.Parameter(torch.zeros(out)))
        for parameter, fan_in in (
            (self.weight1, dim),
            (self.bias1, dim),
            (self.weight2, hidden),
            (self.bias2, hidden),
            (self.gate_weight, dim),
            (self.gate_bias, dim),
        ):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _number(self, tower: Tower) -> int:
        if tower not in self.towers:
            raise ValueError(NO_TOWER.format(tower))
        return self.towers.index(tower)

    def _slice(self, tower: Tower) -> slice:
        start = self._number(tower) * self.dedicated
        return slice(start, start + self.shared + self.dedicated)

    def experts(self, tower: Tower) -> list[Expert]:
        """The weights of one tower's experts, in gate order."""
        at = self._slice(tower)
        stacked = (self.weight1[at], self.bias1[at], self.weight2[at], self.bias2[at])
        return [Expert(*weights) for weights in zip(*stacked, strict=True)]

    def packed(self) -> PackedWeights:
        """The weights as the operator takes them; differentiable."""
        return pack(self.weight1, self.bias1, self.weight2, self.bias2, self.gate_weight, self.gate_bias)

    def tower(self, x: Tensor, tower: Tower) -> Tensor:
        """Knowledge vectors [B, K] of encodings `x` [B, D]; B may be 0."""
        return _towers(self.packed(), self.towers, {tower: x})[tower]

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Knowledge vectors ([Nu, K], [Ni, K]) of user encodings [Nu, D] and item encodings [Ni, D]."""
        vectors = _towers(self.packed(), self.towers, {"user": user, "item": item})
        return vectors["user"], vectors["item"]

    def neutral(self, tower: Tower) -> Tensor:
        """The learned vector [K] of an entity without knowledge."""
        self._number(tower)
        return cast(Tensor, self.get_parameter(f"{tower}_neutral"))

    def adapt(self, encodings: Encoded) -> dict[Tower, Tensor]:
        """Knowledge vectors [B, K] of each tower given: its own where `present` [B] bool is True, else the neutral."""
        # The numbers of an absent encoding, which may be NaN, must not reach a gradient.
        known = {tower: x.masked_fill(~present.unsqueeze(1), 0.0) for tower, (x, present) in encodings.items()}
        neutral = {tower: self.neutral(tower) for tower in encodings}
        return _known_or_neutral(_towers(self.packed(), self.towers, known), neutral, encodings)

    def freeze(self) -> "FrozenAdaptor":
        """This adaptor for inference, its weights packed once, in the dtype that `precision` and its device allow."""
        return FrozenAdaptor(self)

    def save(self, path: Path) -> None:
        """Write all weights, neutral vectors and the precision to one safetensors file."""
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, path, {"format": FORMATS[self.precision]})

    @classmethod
    def load(cls, path: Path) -> "HybridExpertAdaptor":
        """Read a file written by `save`, in its dtype; the module is in evaluation mode.

        Raises:
            ValueError: not an adaptor of this format; the text names the file.
        """
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("format")
            precision = next((precision for precision, name in FORMATS.items() if name == about), None)
            if precision is None:
                raise ValueError(f"{path} does not hold an adaptor of format {FORMAT}: export the release again")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        (experts, hidden, dim), (_, out, _) = weights["weight1"].shape, weights["weight2"].shape
        gates, seen = weights["gate_bias"].shape
        towers = [tower for tower in TOWERS if f"{tower}_neutral" in weights]
        # S + tP = experts, S + P = seen
        dedicated = (experts - seen) // (len(towers) - 1) if len(towers) > 1 else 0
        adaptor = cls(
            dim,
            hidden=hidden,
            out=out,
            shared=seen - dedicated,
            dedicated=dedicated,
            towers=towers,
            one_gate=gates < len(towers),
        )
        adaptor.precision = precision
        adaptor.to(weights["weight1"].dtype).load_state_dict(weights)
        return adaptor.eval()


class FrozenAdaptor:
    """A trained adaptor for inference, with weights packed once, in the dtype of their products.

    Bfloat16 is used where the adaptor's `precision` allows it and the device multiplies it: any GPU that has kernels,
    and processors with AMX or AVX512-BF16. Elsewhere the same weights are multiplied in float32.
    """

    def __init__(self, adaptor: HybridExpertAdaptor) -> None:
        weights = adaptor.packed()
        device = weights.first.device
        fast = adaptor.precision == "bfloat16" and (device.type != "cpu" or has_bfloat16())
        self.weights = weights.to(torch.bfloat16 if fast else weights.first.dtype)
        self.towers, self.out = adaptor.towers, adaptor.out
        self._neutral = {tower: adaptor.neutral(tower).detach().clone() for tower in adaptor.towers}

    def choice(self, rows: int) -> Choice:
        """The implementation that `rows` of both towers get, and why."""
        first = self.weights.first
        return choose(first.device, first.dtype, self.weights.shape, rows, training=False)

    @torch.no_grad()
    def adapt(self, encodings: Encoded) -> dict[Tower, Tensor]:
        """As `HybridExpertAdaptor.adapt`, without gradients."""
        vectors = _towers(self.weights, self.towers, {tower: encoding for tower, (encoding, _) in encodings.items()})
        return _known_or_neutral(vectors, self._neutral, encodings)


def _towers(weights: PackedWeights, towers: Sequence[Tower], x: Mapping[Tower, Tensor]) -> dict[Tower, Tensor]:
    """Vectors of each tower given. The operator takes two towers: one that is missing gets no rows."""
    if missing := [tower for tower in x if tower not in towers]:
        raise ValueError(NO_TOWER.format(missing[0]))
    if not x:
        return {}
    nothing = next(iter(x.values()))[:0]
    first, second = (x[towers[n]] if n < len(towers) and towers[n] in x else nothing for n in (0, 1))
    return {
        tower: out
        for tower, out in zip(towers, hybrid_expert_adaptor(first, second, weights), strict=False)
        if tower in x
    }


def _known_or_neutral(
    vectors: Mapping[Tower, Tensor], neutral: Mapping[Tower, Tensor], encodings: Encoded
) -> dict[Tower, Tensor]:
    return {
        tower: torch.where(encodings[tower][1].unsqueeze(1), vector, neutral[tower].to(vector.dtype))
        for tower, vector in vectors.items()
    }
