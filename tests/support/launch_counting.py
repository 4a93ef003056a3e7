"""Owns the count of operators that would launch a kernel on a GPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")
DEFAULT = {"users": 3, "items": 4, "dim": 64, "hidden": 128, "out": 32}
"""A problem of the product's default sizes, except D."""


class Counting(TorchDispatchMode):
    """Names the operators that would launch a kernel: all but those that give views, new memory, or no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> torch.Tensor:
        """Note the operator, then run it."""
        returns = func._schema.returns
        computes = all(
            "Tensor" in str(result.type) and (result.alias_info is None or result.alias_info.is_write)
            for result in returns
        )
        if computes and func.overloadpacket.__name__ not in ALLOCATING:
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))
