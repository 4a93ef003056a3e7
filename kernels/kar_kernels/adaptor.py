"""Owns the hybrid-expert adaptor as a module: weights, neutral vectors, its safetensors file.

Formula and source: `kar_kernels.reference`. Experts lie in memory as [user's P | shared S | item's P], so that the
S + P experts of either tower are one contiguous slice: a tower is one GEMM over all first layers, one batched GEMM
over all second layers and no copy of weights. An adaptor of one tower has that tower's experts and gate only.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, cast, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kar_kernels.reference import Expert

__all__ = ["TOWERS", "HybridExpertAdaptor", "Tower"]

Tower = Literal["user", "item"]
TOWERS: Final[tuple[Tower, ...]] = get_args(Tower)
FORMAT: Final = "kar.hybrid_expert_adaptor/1"


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
            raise ValueError(f"this adaptor has no {tower} tower: train one with it")
        return self.towers.index(tower)

    def _slice(self, tower: Tower) -> slice:
        start = self._number(tower) * self.dedicated
        return slice(start, start + self.shared + self.dedicated)

    def experts(self, tower: Tower) -> list[Expert]:
        """The weights of one tower's experts, in gate order."""
        at = self._slice(tower)
        stacked = (self.weight1[at], self.bias1[at], self.weight2[at], self.bias2[at])
        return [Expert(*weights) for weights in zip(*stacked, strict=True)]

    def tower(self, x: Tensor, tower: Tower) -> Tensor:
        """Knowledge vectors [B, K] of encodings `x` [B, D]; B may be 0."""
        at, number = self._slice(tower), 0 if self.one_gate else self._number(tower)
        gates = torch.softmax(F.linear(x, self.gate_weight[number], self.gate_bias[number]), dim=-1)  # [B, G]
        first = F.linear(x, self.weight1[at].flatten(0, 1), self.bias1[at].flatten())  # [B, G * H]
        hidden = torch.relu(first).unflatten(1, (-1, self.hidden)).transpose(0, 1)  # [G, B, H]
        second = torch.baddbmm(self.bias2[at].unsqueeze(1), hidden, self.weight2[at].transpose(1, 2))  # [G, B, K]
        return (torch.relu(second) * gates.T.unsqueeze(2)).sum(0)

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Knowledge vectors ([Nu, K], [Ni, K]) of user encodings [Nu, D] and item encodings [Ni, D]."""
        return self.tower(user, "user"), self.tower(item, "item")

    def neutral(self, tower: Tower) -> Tensor:
        """The learned vector [K] of an entity without knowledge."""
        self._number(tower)
        return cast(Tensor, self.get_parameter(f"{tower}_neutral"))

    def adapt(self, encoding: Tensor, present: Tensor, tower: Tower) -> Tensor:
        """Knowledge vectors [B, K]: the tower's where `present` [B] bool is True, else the neutral one."""
        known = present.unsqueeze(1)
        vectors = self.tower(encoding.masked_fill(~known, 0.0), tower)
        return torch.where(known, vectors, self.neutral(tower))

    def save(self, path: Path) -> None:
        """Write all weights and neutral vectors to one safetensors file."""
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, path, {"format": FORMAT})

    @classmethod
    def load(cls, path: Path) -> "HybridExpertAdaptor":
        """Read what `save` wrote, in the dtype it has, in evaluation mode.

        Raises:
            ValueError: not an adaptor of this format; the text names the file.
        """
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
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
        adaptor.to(weights["weight1"].dtype).load_state_dict(weights)
        return adaptor.eval()
