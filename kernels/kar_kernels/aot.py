"""Owns compiling every shipped kernel ahead of time, without a GPU, and reading the compiler's result.

    python -m kar_kernels.aot FILE

writes a JSON list of `Compiled`. It needs Triton with NVIDIA's assembler, which its wheels bring, and no
TRITON_INTERPRET in the environment: interpreted kernels cannot be compiled.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

__all__ = ["ARCHITECTURES", "SHARED_LIMIT_BYTES", "Compiled", "compile_all"]

Arch = Literal[80, 90]
Direction = Literal["forward", "backward"]
ARCHITECTURES: Final[tuple[Arch, ...]] = (80, 90)
SHARED_LIMIT_BYTES: Final[Mapping[int, int]] = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one block may have: CUDA C++ Programming Guide, "Compute Capabilities"."""

ENCODING_POINTERS: Final = ("user_ptr", "item_ptr", "result_ptr", "grad_ptr")
"""Pointers to tensors of the encodings' dtype."""
SUM_POINTERS: Final = ("partial_ptr", "part_ptr")
"""Pointers to float32 sums; all other pointers are to tensors of the weights' dtype."""
COUNTS: Final = ("users", "items", "total", "rows", "chunk_rows", "first_expert")
ALIGNED: Final = ("user_stride", "item_stride", "dim", "logit_column", "hidden_column")
"""Multiples of 16, which Triton specialises for."""
SIZES: Final = {"EXPERTS": 12, "SEEN": 7, "BLOCK_HIDDEN": 128, "BLOCK_OUT": 32, "BLOCK_GATES": 16}
"""The product's default adaptor."""
LARGEST: Final = {"EXPERTS": 62, "SEEN": 32, "BLOCK_GATES": 32}
"""The largest adaptor that kernels are chosen for."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel variant on one architecture: registers a thread, bytes it spills, shared bytes a block."""

    kernel: str
    variant: str
    direction: Direction
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    uses_dot: bool
    tensor_core_instructions: int
    warps: int
    wide_copies: int
    """Asynchronous copies of 16 bytes into shared memory (LDGSTS.128)."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel and the types and constants that it is compiled for."""

    kernel: str
    name: str
    direction: Direction
    dtype: str
    input_dtype: str
    precision: str
    tiles: tuple[int, int, int, int]
    constants: Mapping[str, Any]

    @property
    def function(self) -> str:
        """The name of the kernel's function."""
        name = self.kernel.replace(" ", "_")
        return f"{name}_kernel" if name != self.kernel else f"{name}_{self.direction}_kernel"

    @property
    def module(self) -> str:
        """The module that the function is in, by the first word of the kernel's name."""
        return f"kar_kernels.{self.kernel.split()[0]}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Dtype and arithmetic that variants of several kernels share."""

    dtype: str
    kind: str
    label: str
    input_dtype: str = ""

    def variant(self, kernel: str, direction: Direction, tiles: Sequence[int], *, save: bool | None = None) -> Variant:
        """A kernel's variant; `save` only for kernels with that constant."""
        rows, dim, warps, stages = tiles
        return Variant(
            kernel,
            f"{self.label}, saving" if save else self.label,
            direction,
            self.dtype,
            self.input_dtype or self.dtype,
            "tf32x3" if self.kind == "tf32x3" else "tf32",
            (rows, dim, warps, stages),
            (LARGEST if self.label.endswith("largest") else {}) | ({} if save is None else {"SAVE": save}),
        )


def _variants() -> Iterator[tuple[Variant, tuple[Arch, ...]]]:
    from kar_kernels import fused_expert_pairs, fused_per_expert, gemm_then_fused  # an optional extra: triton

    for dtype, kind in (("bf16", "half"), ("fp16", "half"), ("fp32", "tf32"), ("fp32", "tf32x3")):
        plain = Plan(dtype, kind, kind if dtype == "fp32" else dtype)
        plans = [plain, replace(plain, label=f"{plain.label}, largest")]
        if dtype == "bf16":
            plans.append(replace(plain, label="bf16, x fp32", input_dtype="fp32"))
        for plan in plans:
            mixed = plan.input_dtype != ""
            fused: tuple[Arch, ...] = (90,) if kind == "tf32x3" else ARCHITECTURES
            for save in (False, True):
                if not (mixed and save):
                    yield plan.variant("fused_per_expert", "forward", fused_per_expert.FORWARD[kind], save=save), fused
                if not mixed:
                    yield (
                        plan.variant("gemm_then_fused", "forward", gemm_then_fused.FORWARD[kind], save=save),
                        ARCHITECTURES,
                    )
            yield plan.variant("fused_per_expert", "backward", fused_per_expert.BACKWARD[kind]), fused
            if not mixed:
                yield plan.variant("gemm_then_fused", "backward", gemm_then_fused.BACKWARD[kind]), ARCHITECTURES
            if kind in fused_expert_pairs.FORWARD and plan is plain:
                yield plan.variant("fused_expert_pairs", "forward", fused_expert_pairs.FORWARD[kind]), fused
            if plan is plain:
                yield plan.variant("fused_per_expert reduce", "forward", (fused_per_expert.REDUCE_ROWS, 0, 4, 1)), fused


def _compile(variant: Variant, arch: int) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(variant.module), variant.function)
    rows, dim, warps, stages = variant.tiles
    constants = SIZES | {"SUM_DTYPE": tl.float32, "PRECISION": variant.precision, "BLOCK_ROWS": rows, "BLOCK_DIM": dim}
    constants |= variant.constants
    names = function.arg_names
    types = {}
    for name in names:
        if name in SUM_POINTERS:
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = "*" + (variant.input_dtype if name in ENCODING_POINTERS else variant.dtype)
        elif name in COUNTS or name in ALIGNED:
            types[name] = "i32"
    specialised = [
        parameter.name for parameter in function.params if parameter.name in COUNTS and not parameter.do_not_specialize
    ]
    if specialised:
        raise ValueError(f"{variant.function} would be compiled anew for values of {', '.join(specialised)}")
    aligned = [name for name in types if types[name][0] == "*" or name in ALIGNED]
    compiled = triton.compile(
        ASTSource(
            function,
            {name: types.get(name, "constexpr") for name in names},
            {(names.index(name),): value for name, value in constants.items() if name in names},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    usage, code = _disassemble(compiled.asm["cubin"])
    return Compiled(
        variant.kernel,
        variant.name,
        variant.direction,
        arch,
        registers=int(_first_group(r"REG:(\d+)", usage)),
        spill_bytes=int(_first_group(r"STACK:(\d+)", usage)),
        shared_bytes=compiled.metadata.shared,
        uses_dot="tt.dot" in compiled.asm["ttir"],
        tensor_core_instructions=len(re.findall(r"\b(?:HGMMA|HMMA)\b", code)),
        warps=warps,
        wide_copies=len(re.findall(r"\bLDGSTS\S*\.128\b", code)),
    )


def _first_group(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the assembler's tools did not print {pattern}: is this Triton newer than those tried?")
    return match[1]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", "-ndf", path], capture_output=True, text=True, check=True)
    return usage.stdout, code.stdout


def _compile_number(task: tuple[int, int]) -> Compiled:
    number, arch = task
    return _compile(list(_variants())[number][0], arch)


def compile_all(processes: int, on_compiled: Callable[[int, int], None] = lambda done, total: None) -> list[Compiled]:
    """Compile every variant; `on_compiled` gets the number of variants done and of all."""
    tasks = [(number, arch) for number, (_, archs) in enumerate(_variants()) for arch in archs]
    compiled = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, variant in enumerate(pool.imap(_compile_number, tasks), 1):
            compiled.append(variant)
            on_compiled(done, len(tasks))
    return compiled


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kar_kernels.aot FILE")
    compiled = compile_all(
        len(os.sched_getaffinity(0)), lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr)
    )
    Path(sys.argv[1]).write_text(json.dumps([asdict(variant) for variant in compiled], indent=1) + "\n")
