"""Owns compiling every shipped kernel ahead of time, without a GPU, and reading what the compiler made of it.

    python -m kar_kernels.aot FILE

writes a JSON list of `Compiled`. It needs Triton with NVIDIA's assembler, which its wheels bring, and no
TRITON_INTERPRET in the environment: what the interpreter runs cannot be compiled.
"""

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
"""What one block may have: CUDA C++ Programming Guide, "Compute Capabilities"."""

POINTERS: Final = (
    "user",
    "item",
    "first",
    "bias1",
    "weight2",
    "bias2",
    "layer",
    "value",
    "result",
    "grad",
    "z",
    "z_grad",
)
GRADS: Final = ("first_grad", "bias1_grad", "weight2_grad", "bias2_grad")
SUMS: Final = ("partial", "part")
COUNTS: Final = ("users", "items", "total", "rows", "chunk_rows", "first_expert")
ALIGNED: Final = ("user_stride", "item_stride", "dim", "logit_at", "hidden_at")
"""Multiples of 16, which Triton specialises for."""
INPUTS: Final = ("user", "item", "result", "grad")
"""Of the encodings' dtype."""
SIZES: Final = {"EXPERTS": 12, "SEEN": 7, "HIDDEN": 128, "OUT": 32, "GATE_ROWS": 16}
"""The product's default adaptor."""
LARGEST: Final = {"EXPERTS": 62, "SEEN": 32, "GATE_ROWS": 32}
"""The largest that kernels are chosen for."""


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
    """What `triton.compile` is told."""

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
        """The kernel's function, in the module of its name's first word."""
        return f"{self.kernel.replace(' ', '_') if ' ' in self.kernel else f'{self.kernel}_{self.direction}'}_kernel"


@dataclass(frozen=True, slots=True)
class Plan:
    """What variants of several kernels have in common."""

    dtype: str
    kind: str
    label: str
    input_dtype: str = ""

    def variant(self, kernel: str, direction: Direction, tiles: Sequence[int], *, save: bool | None = None) -> Variant:
        """A kernel's variant; `save` only for those that have the choice."""
        rows, columns, warps, stages = tiles
        return Variant(
            kernel,
            f"{self.label}, saving" if save else self.label,
            direction,
            self.dtype,
            self.input_dtype or self.dtype,
            "tf32x3" if self.kind == "tf32x3" else "tf32",
            (rows, columns, warps, stages),
            (LARGEST if self.label.endswith("largest") else {}) | ({} if save is None else {"SAVE": save}),
        )


def _variants() -> Iterator[tuple[Variant, tuple[Arch, ...]]]:
    from kar_kernels import pair, split, tail

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
                    yield plan.variant("split", "forward", split.FORWARD[kind], save=save), fused
                if not mixed:
                    yield plan.variant("tail", "forward", tail.FORWARD[kind], save=save), ARCHITECTURES
            yield plan.variant("split", "backward", split.BACKWARD[kind]), fused
            if not mixed:
                yield plan.variant("tail", "backward", tail.BACKWARD[kind]), ARCHITECTURES
            if kind in pair.FORWARD and plan is plain:
                yield plan.variant("pair", "forward", pair.FORWARD[kind]), fused
            if plan is plain:
                yield plan.variant("split reduce", "forward", (split.REDUCE_ROWS, 0, 4, 1)), fused


def _compile(variant: Variant, arch: int) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kar_kernels import pair, split, tail

    module = {"split": split, "pair": pair, "tail": tail}[variant.kernel.split()[0]]
    function = getattr(module, variant.function)
    rows, columns, warps, stages = variant.tiles
    given = SIZES | {"SUM": tl.float32, "PRECISION": variant.precision, "ROWS": rows, "COLUMNS": columns}
    given |= variant.constants
    names = function.arg_names
    types = {}
    for name in names:
        if name in SUMS:
            types[name] = "*fp32"
        elif name in POINTERS or name in GRADS:
            types[name] = "*" + (variant.input_dtype if name in INPUTS else variant.dtype)
        elif name in COUNTS or name in ALIGNED:
            types[name] = "i32"
    if anew := [one.name for one in function.params if one.name in COUNTS and not one.do_not_specialize]:
        raise ValueError(f"{variant.function} would be compiled anew for values of {', '.join(anew)}")
    aligned = [name for name in types if types[name][0] == "*" or name in ALIGNED]
    compiled = triton.compile(
        ASTSource(
            function,
            {name: types.get(name, "constexpr") for name in names},
            {(names.index(name),): value for name, value in given.items() if name in names},
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
        registers=int(_found(r"REG:(\d+)", usage)),
        spill_bytes=int(_found(r"STACK:(\d+)", usage)),
        shared_bytes=compiled.metadata.shared,
        uses_dot="tt.dot" in compiled.asm["ttir"],
        tensor_core_instructions=len(re.findall(r"\b(?:HGMMA|HMMA)\b", code)),
        warps=warps,
        wide_copies=len(re.findall(r"\bLDGSTS\S*\.128\b", code)),
    )


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the assembler's tools did not print {pattern}: is this Triton newer than those tried?")
    return found[1]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True)
    return usage.stdout, code.stdout


def _compile_number(task: tuple[int, int]) -> Compiled:
    number, arch = task
    return _compile(list(_variants())[number][0], arch)


def compile_all(processes: int, on_compiled: Callable[[int, int], None] = lambda done, total: None) -> list[Compiled]:
    """Compile every variant; `on_compiled` gets how many are done, and of how many."""
    tasks = [(number, arch) for number, (_, archs) in enumerate(_variants()) for arch in archs]
    made = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, one in enumerate(pool.imap(_compile_number, tasks), 1):
            made.append(one)
            on_compiled(done, len(tasks))
    return made


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kar_kernels.aot FILE")
    found = compile_all(
        len(os.sched_getaffinity(0)), lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr)
    )
    Path(sys.argv[1]).write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
