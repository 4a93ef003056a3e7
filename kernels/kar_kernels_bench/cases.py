"""Owns the cases of the GPU benchmark: rows, D, dtypes and directions, and which forms exist for them."""

from dataclasses import dataclass
from typing import Final, Literal

import torch

from kar_kernels.dispatch import takes_pairs
from kar_kernels.layout import Shape
from kar_kernels_bench.forms import BASELINES, KERNELS, dtype_name

__all__ = ["CASES", "TINY", "TINY_EXPERTS", "Case", "Direction", "has_form"]

Direction = Literal["forward", "backward", "both"]


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of both towers, D, the weights' and encodings' dtype, the directions and the forms."""

    users: int
    items: int
    dim: int
    dtype: torch.dtype
    directions: tuple[Direction, ...] = ("forward",)
    forms: tuple[str, ...] = (*BASELINES, *KERNELS)

    @property
    def label(self) -> str:
        """The case in a few words."""
        return f"{self.users:,} + {self.items:,} rows, D = {self.dim}, {dtype_name(self.dtype)}"


TRAINED: Final[tuple[Direction, ...]] = ("forward", "backward", "both")
DIMS: Final = (768, 384, 1024, 4096)
SIZES: Final = ((1, 100), (1, 500), (512, 512), (0, 1_000_000), (65_536, 65_536))


def _cases() -> list[Case]:
    """All, the most telling first: a run that is out of time leaves out the last."""
    half = [
        Case(users, items, dim, torch.bfloat16, TRAINED if dim == 768 and users in (512, 65_536) else ("forward",))
        for dim in DIMS
        for users, items in SIZES
    ]
    single = [
        Case(users, items, dim, torch.float32, forms=BASELINES[:1] if dim != 768 else (*BASELINES, *KERNELS))
        for dim in DIMS
        for users, items in SIZES
        if items * dim <= 1_000_000 * 1024
    ]
    return half + single


CASES: Final = _cases()
TINY: Final = [
    Case(3, 5, 64, torch.float32, TRAINED, ("eager", "concatenated", *KERNELS)),
    Case(0, 9, 64, torch.float16, ("forward",), ("eager", "concatenated", *KERNELS)),
]
TINY_EXPERTS: Final = 1
"""Shared and dedicated experts of a tiny run's adaptor: the interpreter takes as long for each."""


def has_form(name: str, direction: Direction, dtype: torch.dtype, shape: Shape) -> bool:
    """Whether a form exists for this direction and these sizes."""
    return name != "fused_expert_pairs" or (direction == "forward" and takes_pairs(dtype, shape))
