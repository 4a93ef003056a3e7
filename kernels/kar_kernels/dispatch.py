"""Owns the choice of an implementation: by device, dtype, sizes and rows, or by the variable KAR_ADAPTOR."""

import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, get_args

import torch

from kar_kernels.layout import Shape

__all__ = [
    "ENVIRONMENT",
    "FUSED",
    "KERNELS",
    "PATHS",
    "Choice",
    "ImplementationError",
    "Path",
    "Request",
    "choose",
    "takes_pairs",
]

Path = Literal["fused_per_expert", "fused_expert_pairs", "gemm_then_fused", "cpu", "eager"]
"""An implementation, named as its module."""
Request = Path | Literal["fused", "tail"]
"""What a caller may ask for: a path, `FUSED`, or "tail", the former name of gemm_then_fused."""
PATHS: Final[tuple[Path, ...]] = get_args(Path)
KERNELS: Final[tuple[Path, ...]] = PATHS[:3]
"""The paths with Triton kernels."""
FUSED: Final = "fused"
"""Asks for the fused kernel that suits the rows: fused_expert_pairs or fused_per_expert."""
FORMER_NAMES: Final[dict[str, Path]] = {"tail": "gemm_then_fused"}
ENVIRONMENT: Final = "KAR_ADAPTOR"
"""Environment variable that names the implementation to use."""

BULK_ROWS: Final = 4096
"""Rows up to which the experts are needed to fill the chip: more get `fused_expert_pairs`, not `fused_per_expert`."""
BULK_DIM: Final = 1024
"""Largest D at which `fused_expert_pairs` is expected to beat `gemm_then_fused` on bulk rows. Not measured yet."""
PAIR_GATE_ROWS: Final = 16
TRAINING_ROWS: Final = 16384
"""Rows up to which a saved first layer fits into the L2 cache, where `fused_per_expert`'s backward reads it often."""
LARGEST: Final = {"hidden": 128, "out": 32, "gate_rows": 32}
"""Sizes up to which the kernels are compiled and checked not to spill registers (`kar_kernels.aot`)."""

log = logging.getLogger("kar_kernels")


class ImplementationError(ValueError):
    """The requested implementation does not exist or cannot run here; the text says why."""

    exit_code = 2
    """Exit code of a command that this error ends: wrong usage."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation and why."""

    path: Path
    reason: str


def choose(
    device: torch.device, dtype: torch.dtype, shape: Shape, rows: int, *, training: bool, requested: str = ""
) -> Choice:
    """The implementation for `rows` of both towers together, logged when it is chosen for the first time.

    Args:
        device: Where the tensors are.
        dtype: The weights'.
        shape: The packed adaptor's sizes.
        rows: Users and items.
        training: Whether a backward follows.
        requested: A `Request`; empty: KAR_ADAPTOR, if it is set.

    Raises:
        ImplementationError: the requested implementation does not exist or cannot run here; the text says why.
    """
    source = "path" if requested else ENVIRONMENT
    requested = requested or os.environ.get(ENVIRONMENT, "")
    if requested:
        return _log_choice(_choose_requested(requested, source, device, dtype, shape, rows, training=training))
    if device.type == "cpu":
        choice = Choice("cpu", "tensors are on the processor")
    elif obstacle := _obstacle(device, dtype, shape):
        choice = Choice("eager", obstacle)
    elif obstacle := _fused_obstacle(device, dtype):
        choice = Choice("gemm_then_fused", obstacle)
    elif training and rows > TRAINING_ROWS:
        choice = Choice("gemm_then_fused", f"more than {TRAINING_ROWS} rows to train on")
    elif not training and rows > BULK_ROWS and (obstacle := _bulk_obstacle(dtype, shape)):
        choice = Choice("gemm_then_fused", f"more than {BULK_ROWS} rows, and {obstacle}")
    else:
        choice = Choice(_fused_path(dtype, shape, rows, training=training), "a GPU with tensor cores")
    return _log_choice(choice)


def _choose_requested(
    requested: str,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    rows: int,
    *,
    training: bool,
) -> Choice:
    name = FORMER_NAMES.get(requested, requested)
    if name != FUSED and name not in PATHS:
        raise ImplementationError(
            f"{source}={requested} is no implementation: choose from {', '.join((FUSED, *PATHS))}"
        )
    if name == "cpu" and device.type != "cpu":
        raise ImplementationError(f"{source}=cpu, but the tensors are on {device}: leave it out")
    obstacle = ""
    if name == FUSED or name in KERNELS:
        obstacle = _obstacle(device, dtype, shape)
        if name != "gemm_then_fused":
            obstacle = obstacle or _fused_obstacle(device, dtype)
        if name == "fused_expert_pairs":
            obstacle = obstacle or _pairs_obstacle(dtype, shape, training=training)
    if obstacle:
        raise ImplementationError(f"{source}={requested} cannot run: {obstacle}")
    path = _fused_path(dtype, shape, rows, training=training) if name == FUSED else PATHS[PATHS.index(name)]
    return Choice(path, f"{source} says so")


@cache
def _log_choice(choice: Choice) -> Choice:
    """The same choice, logged at the first call with it."""
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
    too_large = [
        f"{name} {getattr(shape, name)}" for name, largest in LARGEST.items() if getattr(shape, name) > largest
    ]
    return f"there are no kernels for {', '.join(too_large)}" if too_large else ""


def _fused_path(dtype: torch.dtype, shape: Shape, rows: int, *, training: bool) -> Path:
    pairs = not training and rows > BULK_ROWS and takes_pairs(dtype, shape)
    return "fused_expert_pairs" if pairs else "fused_per_expert"


def takes_pairs(dtype: torch.dtype, shape: Shape) -> bool:
    """Whether the sums of two experts and the gates fit into the registers of one program."""
    return not (dtype == torch.float32 and _exact()) and shape.gate_rows <= PAIR_GATE_ROWS


def _pairs_obstacle(dtype: torch.dtype, shape: Shape, *, training: bool) -> str:
    """Why `fused_expert_pairs` cannot run; empty if it can."""
    if training:
        return "it has no backward"
    return "" if takes_pairs(dtype, shape) else "two experts' sums do not fit into the registers"


def _bulk_obstacle(dtype: torch.dtype, shape: Shape) -> str:
    """Why `fused_expert_pairs` should not run on bulk rows; empty if it should.

    `fused_per_expert` is no substitute: it would need memory for partial sums.
    """
    if obstacle := _pairs_obstacle(dtype, shape, training=False):
        return obstacle
    return f"more than {BULK_DIM} components, which the L2 cache does not hold" if shape.dim > BULK_DIM else ""


def _exact() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def _fused_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why no fused kernel can run although kernels can; empty if one can."""
    exact = dtype == torch.float32 and _exact()
    if device.type == "cuda" and exact and torch.cuda.get_device_capability(device) < (9, 0):
        return "exact float32 in one kernel needs the registers of compute capability 9.0"
    return ""
