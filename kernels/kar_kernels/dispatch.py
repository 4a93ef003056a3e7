"""Owns the choice of an implementation: by device, dtype, sizes and rows, or by the environment's word."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, get_args

import torch

from kar_kernels.layout import Shape

__all__ = ["ENVIRONMENT", "PATHS", "Choice", "ImplementationError", "Path", "choose", "takes_pairs"]

Path = Literal["fused", "tail", "cpu", "eager"]
PATHS: Final[tuple[Path, ...]] = get_args(Path)
ENVIRONMENT: Final = "KAR_ADAPTOR"
"""Environment variable that names the implementation to use, for whoever measures or doubts."""

BULK_ROWS: Final = 4096
"""Rows from which the chip is full without the expert axis: `pair` instead of `split`."""
BULK_DIM: Final = 1024
"""Largest D at which `pair` is expected to beat a library GEMM with `tail` on bulk rows. Not measured yet."""
PAIR_GATE_ROWS: Final = 16
TRAINING_ROWS: Final = 16384
"""Rows up to which a saved first layer fits into the L2 cache, where `split`'s backward reads it again and again."""
LARGEST: Final = {"hidden": 128, "out": 32, "gate_rows": 32}
"""Sizes up to which the kernels are compiled and checked not to spill registers (`kar_kernels.aot`)."""

log = logging.getLogger("kar_kernels")


class ImplementationError(ValueError):
    """The implementation that is asked for does not exist or cannot run here; the text says why."""

    exit_code = 2
    """Of a command that ends for it: wrong usage."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation and why."""

    path: Path
    reason: str


def choose(
    device: torch.device, dtype: torch.dtype, shape: Shape, rows: int, *, training: bool, named: str = ""
) -> Choice:
    """The implementation for `rows` of both towers, weights of `dtype` and whether a backward follows.

    Logs each choice once. `named`, or else `KAR_ADAPTOR`, overrides it.

    Raises:
        ImplementationError: what is named does not exist, or cannot run here; the text says why.
    """
    by = "path" if named else ENVIRONMENT
    named = named or os.environ.get(ENVIRONMENT, "")
    if device.type == "cpu" and not named:
        return _said(Choice("cpu", "tensors are on the processor"))
    obstacle = _obstacle(device, dtype, shape)
    if named:
        if named not in PATHS:
            raise ImplementationError(f"{by}={named} is no implementation: choose from {', '.join(PATHS)}")
        if named == "cpu" and device.type != "cpu":
            raise ImplementationError(f"{by}=cpu, but the tensors are on {device}: leave it out")
        if obstacle and (named == "tail" or named == "fused"):
            raise ImplementationError(f"{by}={named} cannot run: {obstacle}")
        if named == "fused" and (spills := _fused_obstacle(device, dtype)):
            raise ImplementationError(f"{by}=fused cannot run: {spills}")
        choice = Choice(named, f"{by} says so")
    elif obstacle:
        choice = Choice("eager", obstacle)
    elif spills := _fused_obstacle(device, dtype):
        choice = Choice("tail", spills)
    elif training and rows > TRAINING_ROWS:
        choice = Choice("tail", f"more than {TRAINING_ROWS} rows to train on")
    elif not training and rows > BULK_ROWS and (slow := _bulk_obstacle(dtype, shape)):
        choice = Choice("tail", f"more than {BULK_ROWS} rows, and {slow}")
    else:
        choice = Choice("fused", "a GPU with tensor cores")
    return _said(choice)


@cache
def _said(choice: Choice) -> Choice:
    """The same, once logged."""
    log.info("adaptor runs %s: %s", choice.path, choice.reason)
    return choice


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(device: torch.device, dtype: torch.dtype, shape: Shape) -> str:
    """Why no Triton kernel can run; empty if one can."""
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cpu":
        if not _interpreted():
            return "kernels run on a GPU, or on the processor with TRITON_INTERPRET=1"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        return ""
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    if dtype == torch.float64:
        return "there are no tensor-core kernels for float64"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "kernels are compiled for compute capability 8.0 and above"
    over = [f"{name} {getattr(shape, name)}" for name, most in LARGEST.items() if getattr(shape, name) > most]
    return f"there are no kernels for {', '.join(over)}" if over else ""


def takes_pairs(dtype: torch.dtype, shape: Shape) -> bool:
    """Whether the sums of two experts and the gates fit into the registers of one program."""
    return not (dtype == torch.float32 and _exact()) and shape.gate_rows <= PAIR_GATE_ROWS


def _bulk_obstacle(dtype: torch.dtype, shape: Shape) -> str:
    """Why `pair` should not run; empty if it should. In its place, `split` would need memory for partial sums."""
    if not takes_pairs(dtype, shape):
        return "two experts' sums do not fit into the registers"
    return f"more than {BULK_DIM} components, which the L2 cache does not hold" if shape.dim > BULK_DIM else ""


def _exact() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def _fused_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    exact = dtype == torch.float32 and _exact()
    if device.type == "cuda" and exact and torch.cuda.get_device_capability(device) < (9, 0):
        return "exact float32 in one kernel needs the registers of compute capability 9.0"
    return ""
