"""Owns the packed layout of an adaptor's weights, which every implementation of the operator reads.

First layers and gates of both towers lie in one matrix, so that a tower multiplies its encodings by one block of
rows, and the shared experts exist once:

    user gate | user's P experts | S shared experts | item's P experts | item gate
    `------------ user: W rows -------------------'
                                 `--------------- item: W rows ---------------'

A gate has `gate_rows` rows, an expert `hidden` rows. Sizes that a kernel needs as powers of two (gate rows, hidden,
out) and D, which it takes in steps of 64, are padded with zeros, which adds nothing to any sum: a padded hidden
component is ReLU(0) = 0.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["STEP", "PackedWeights", "Shape", "TowerWeights", "pack"]

SMALLEST: Final = 16
"""Rows and columns below which a tensor core has no instruction."""


STEP: Final = 64
"""The packed D is a multiple of this."""


def _padded(size: int) -> int:
    return max(SMALLEST, 1 << (size - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a packed adaptor: `seen` experts G a tower of `experts` E, padded `hidden` H, `out` K, `gate_rows`."""

    dim: int
    experts: int
    seen: int
    hidden: int
    out: int
    gate_rows: int

    @staticmethod
    def of(first: Tensor, weight2: Tensor, seen: int) -> "Shape":
        """The shape that packed tensors have.

        Raises:
            ValueError: they were not packed by `pack`.
        """
        (rows, dim), (experts, out, hidden) = first.shape, weight2.shape
        gate_rows = _padded(seen)
        padded = (_padded(hidden), _padded(out), dim % STEP) == (hidden, out, 0)
        if not padded or rows != experts * hidden + 2 * gate_rows or not seen <= experts <= 2 * seen:
            raise ValueError(f"weights {list(first.shape)} and {list(weight2.shape)} are not packed: use `pack`")
        return Shape(dim, experts, seen, hidden, out, gate_rows)

    @property
    def width(self) -> int:
        """Columns W of a tower's first layer: its gate and its experts."""
        return self.gate_rows + self.seen * self.hidden

    @property
    def rows(self) -> int:
        """Rows of the packed matrix."""
        return 2 * self.gate_rows + self.experts * self.hidden

    def tower(self, tower: int) -> slice:
        """The rows of tower 0 (user) or 1 (item)."""
        return slice(0, self.width) if tower == 0 else slice(self.rows - self.width, self.rows)

    def gates(self, tower: int) -> slice:
        """Which of a tower's W columns are its gate's logits, padding left out."""
        start = 0 if tower == 0 else self.width - self.gate_rows
        return slice(start, start + self.seen)

    def hiddens(self, tower: int) -> slice:
        """Which of a tower's W columns are its experts' hidden components."""
        start = self.gate_rows if tower == 0 else 0
        return slice(start, start + self.seen * self.hidden)

    def each(self, hidden: Tensor) -> Tensor:
        """Experts' hidden components [n, G H] as a view [G, n, H]."""
        return hidden.unflatten(1, (self.seen, self.hidden)).transpose(0, 1)

    def expert(self, tower: int) -> slice:
        """Which of all experts a tower sees, in gate order."""
        return slice(0, self.seen) if tower == 0 else slice(self.experts - self.seen, self.experts)


class TowerWeights(NamedTuple):
    """Views of one tower's weights, experts in gate order."""

    gate: Tensor
    """[G, D]."""
    gate_bias: Tensor
    """[G]."""
    hidden: Tensor
    """[G H, D], first layers."""
    hidden_bias: Tensor
    """[G H]."""
    second: Tensor
    """[G, H, K], second layers, transposed."""
    second_bias: Tensor
    """[G, 1, K]."""


@dataclass(frozen=True)
class PackedWeights:
    """Packed tensors of one dtype on one device.

    `first` [2 gate_rows + E H, D] and `bias1` [2 gate_rows + E H] as in the module's drawing, `weight2` [E, K, H],
    `bias2` [E, K], all padded; `seen` is G; `dim` and `out` are D and K without padding.
    """

    first: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    seen: int
    dim: int
    out: int

    @property
    def shape(self) -> Shape:
        """Their sizes; raises as `Shape.of` does."""
        return Shape.of(self.first, self.weight2, self.seen)

    @cached_property
    def towers(self) -> tuple[TowerWeights, TowerWeights]:
        """Of user and item; making the views takes a request of one user a tenth of its time."""
        shape = self.shape
        return self._tower(shape, 0), self._tower(shape, 1)

    def _tower(self, shape: Shape, tower: int) -> TowerWeights:
        first, bias1 = self.first[shape.tower(tower)], self.bias1[shape.tower(tower)]
        gate, hidden, experts = shape.gates(tower), shape.hiddens(tower), shape.expert(tower)
        second, second_bias = self.weight2[experts].transpose(1, 2), self.bias2[experts].unsqueeze(1)
        return TowerWeights(first[gate], bias1[gate], first[hidden], bias1[hidden], second, second_bias)

    def to(self, dtype: torch.dtype) -> "PackedWeights":
        """The same weights in another dtype, outside of autograd."""
        first, bias1, weight2, bias2 = (
            packed.detach().to(dtype, copy=True) for packed in (self.first, self.bias1, self.weight2, self.bias2)
        )
        return PackedWeights(first, bias1, weight2, bias2, self.seen, self.dim, self.out)


def pack(
    weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, gate_weight: Tensor, gate_bias: Tensor
) -> PackedWeights:
    """Lay out weights for the operator; differentiable.

    Args:
        weight1: [E, H, D], experts in the order user's, shared, item's.
        bias1: [E, H].
        weight2: [E, K, H].
        bias2: [E, K].
        gate_weight: [T, G, D]; with T = 1 all towers share the gate.
        gate_bias: [T, G].
    """
    (_, hidden, dim), (_, out, _), seen = weight1.shape, weight2.shape, gate_weight.shape[1]
    more_hidden, more_out, more_gates = _padded(hidden) - hidden, _padded(out) - out, _padded(seen) - seen
    if more_dim := -dim % STEP:
        weight1, gate_weight = F.pad(weight1, (0, more_dim)), F.pad(gate_weight, (0, more_dim))
    if more_hidden:
        weight1, bias1 = F.pad(weight1, (0, 0, 0, more_hidden)), F.pad(bias1, (0, more_hidden))
    if more_hidden or more_out:
        weight2, bias2 = F.pad(weight2, (0, more_hidden, 0, more_out)), F.pad(bias2, (0, more_out))
    zeros = weight1.new_zeros(more_gates, dim + more_dim)
    first = torch.cat([gate_weight[0], zeros, weight1.flatten(0, 1), gate_weight[-1], zeros])
    zero = bias1.new_zeros(more_gates)
    bias = torch.cat([gate_bias[0], zero, bias1.flatten(), gate_bias[-1], zero])
    # The kernels read rows that lie one after another.
    return PackedWeights(first, bias, weight2.contiguous(), bias2.contiguous(), seen, dim, out)
