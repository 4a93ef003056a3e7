"""Owns a model of one forward's work: floating-point operations, bytes that must move, and the least time."""

from dataclasses import dataclass

from kar_kernels.layout import Shape

__all__ = ["H100", "Chip", "Work", "forward_work"]


@dataclass(frozen=True, slots=True)
class Chip:
    """What a chip sustains: memory bandwidth and tensor-core throughput."""

    bytes_per_s: float
    flop_per_s: float


H100 = Chip(3.0e12, 798e12)
"""The values that the design assumes: HBM3 at 90 %, a large bfloat16 product at 81 % of the data sheet."""


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, and bytes between the chip and its memory when nothing is read or written twice."""

    flop: float
    fused_bytes: float
    concatenated_bytes: float
    """With first layers, values and logits written and read again, ReLU fused into the product."""

    def bound_s(self, chip: Chip, *, fused: bool = True) -> float:
        """Seconds below which a forward cannot go."""
        moved = self.fused_bytes if fused else self.concatenated_bytes
        return max(self.flop / chip.flop_per_s, moved / chip.bytes_per_s)


def forward_work(users: int, items: int, shape: Shape, element_bytes: int) -> Work:
    """The work of one forward over `users` and `items` rows."""
    rows = users + items
    first = shape.seen * (shape.hidden + 1)
    flop = 2.0 * rows * (shape.dim * first + shape.seen * shape.hidden * shape.out)
    experts = shape.experts if users and items else shape.seen
    towers = bool(users) + bool(items)
    weights = experts * (shape.hidden * (shape.dim + shape.out + 1) + shape.out) + towers * shape.seen * (shape.dim + 1)
    fused = (weights + rows * (shape.dim + shape.out)) * element_bytes
    between = rows * (first + shape.seen * shape.out) * element_bytes
    return Work(flop, fused, fused + 2 * between)
