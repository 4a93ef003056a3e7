"""Owns the benchmark's report: figures of the compiled kernels, tables, and their blocks in docs/kernels.md."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch

from kar_kernels.aot import Compiled
from kar_kernels.layout import Shape
from kar_kernels_bench.roofline import H100, forward_work

__all__ = ["NO_TRITON", "compile_report", "has_triton", "kernel_table", "roofline_table", "write_block"]


FORMER_NAMES: Final = {
    "split": "fused_per_expert",
    "split reduce": "fused_per_expert reduce",
    "pair": "fused_expert_pairs",
    "tail": "gemm_then_fused",
}
"""Kernels in reports written before they had today's names."""


NO_TRITON: Final = "triton is not installed: GPU kernels were left out; to compile them: pip install 'kar-sidecar[gpu]'"


def has_triton() -> bool:
    """Whether the kernels can be compiled here; processors need none."""
    return importlib.util.find_spec("triton") is not None


def compile_report(on_line: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """The list that `python -m kar_kernels.aot` writes; empty where triton is not installed.

    It runs in a process of its own, since kernels that this process interprets cannot be compiled.

    Raises:
        RuntimeError: it broke down; the text has its last words.
    """
    if not has_triton():
        return []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "aot.json")
        process = subprocess.Popen(
            [sys.executable, "-m", "kar_kernels.aot", path], env=environment, stderr=subprocess.PIPE, text=True
        )
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.strip())
            on_line(lines[-1])
        if process.wait():
            raise RuntimeError(f"compiling the kernels failed: {lines[-1] if lines else 'it printed nothing'}")
        return list(json.loads(path.read_text()))


def kernel_table(compiled: Sequence[Mapping[str, Any]]) -> str:
    """Registers, spills, shared memory and instructions of every kernel, in Markdown."""
    names = {field.name for field in fields(Compiled)}
    lines = [
        "| kernel | variant | direction | sm | warps | registers | spilled bytes | shared KiB "
        "| tensor-core instructions | 16-byte async copies |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in compiled:
        if not names <= one.keys():
            raise ValueError(f"not a report of kar_kernels.aot: {sorted(names - one.keys())} missing")
        dots = one["tensor_core_instructions"] if one["uses_dot"] else "no dot"
        name = FORMER_NAMES.get(one["kernel"], one["kernel"])
        lines.append(
            f"| {name} | {one['variant']} | {one['direction']} | {one['arch']} | {one['warps']} "
            f"| {one['registers']} | {one['spill_bytes']} | {one['shared_bytes'] / 1024:.0f} | {dots} "
            f"| {one['wide_copies']} |"
        )
    return "\n".join(lines)


def roofline_table() -> str:
    """The model of one forward in bfloat16 on an H100: operations, bytes and bounds, in Markdown."""
    lines = [
        "| rows | D | GFLOP | MB fused | MB concatenated | bound fused, us | bound concatenated, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for users, items in ((1, 100), (1, 500), (512, 512), (65_536, 65_536), (0, 1_000_000)):
        for dim in (384, 768, 1024, 4096):
            work = forward_work(users, items, default_shape(dim), 2)
            lines.append(
                f"| {users:,} + {items:,} | {dim} | {work.flop / 1e9:.3g} | {work.fused_bytes / 1e6:.3g} "
                f"| {work.concatenated_bytes / 1e6:.3g} | {work.bound_s(H100) * 1e6:.3g} "
                f"| {work.bound_s(H100, fused=False) * 1e6:.3g} |"
            )
    return "\n".join(lines)


def default_shape(dim: int) -> Shape:
    """Of the product's default adaptor."""
    return Shape(dim, experts=12, seen=7, hidden=128, out=32, gate_rows=16)


def write_block(path: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- name -->` and `<!-- /name -->` of a Markdown file.

    Raises:
        ValueError: it has no such block.
    """
    page = path.read_text()
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{path} has no block <!-- {name} --> ... <!-- /{name} -->: add it where the table belongs")
    path.write_text(pattern.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page))


def device_name(device: torch.device) -> str:
    """A GPU's name, or "interpreter"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
