"""The compile gate: registers, spills and instructions of every kernel, without a GPU."""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kar_kernels import aot
from kar_kernels.aot import SHARED_LIMIT_BYTES, Compiled

pytestmark = [
    pytest.mark.service,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
COMMAND = [sys.executable, "-m", "kar_kernels.aot"]


def run(*arguments, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def source_hash():
    """Hash of everything that the compiler's result depends on: the package's modules and Triton's version."""
    hashed = hashlib.sha256(importlib.metadata.version("triton").encode())
    for path in sorted(Path(aot.__file__).parent.glob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


@pytest.fixture(scope="session")
def compiled(request):
    """All variants, compiled once for all workers, and not again in a later run of the same sources."""
    folder = request.config.cache.mkdir("compiled_kernels")
    file = folder / f"{source_hash()}.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            for older in folder.glob("*.json"):
                older.unlink()
            done = run(file.with_suffix(".part"), TRITON_INTERPRET="0")
            assert done.returncode == 0, done.stderr
            file.with_suffix(".part").rename(file)
    return [Compiled(**one) for one in json.loads(file.read_text())]


def names(compiled):
    return [f"{one.kernel} {one.direction}, {one.variant}, {one.arch}" for one in compiled]


def test_no_register_is_spilled(compiled):
    assert names(one for one in compiled if one.spill_bytes) == []
    # An instruction can name 255 registers: a wrong reading of the tools would give more, or nothing.
    assert names(one for one in compiled if not 16 <= one.registers <= 255) == []


def test_a_block_has_the_shared_memory(compiled):
    # From the CUDA C++ Programming Guide, "Compute Capabilities".
    assert SHARED_LIMIT_BYTES == {80: 166912, 90: 232448}
    assert names(one for one in compiled if one.shared_bytes > SHARED_LIMIT_BYTES[one.arch]) == []
    assert names(one for one in compiled if one.uses_dot and one.shared_bytes < 4096) == []


def test_products_run_on_tensor_cores(compiled):
    assert names(one for one in compiled if one.uses_dot and not one.tensor_core_instructions) == []
    assert {one.kernel for one in compiled if not one.uses_dot} == {"fused_per_expert reduce"}


def test_encodings_come_in_copies_of_16_bytes(compiled):
    gemms = [
        one
        for one in compiled
        if one.kernel in ("fused_per_expert", "fused_expert_pairs") and one.direction == "forward"
    ]
    assert gemms
    assert names(one for one in gemms if not one.wide_copies) == []


def test_registers_let_a_block_run(compiled):
    # 65,536 registers a multiprocessor of both, for 32 threads a warp.
    assert names(one for one in compiled if one.registers * 32 * one.warps > 65_536) == []


def test_nothing_that_ships_is_left_out(compiled):
    seen = {(one.kernel, one.direction, one.arch, one.variant) for one in compiled}
    assert len(seen) == len(compiled)
    for arch in (80, 90):
        for dtype in ("bf16", "fp16", "tf32"):
            for kernel, direction in (
                ("fused_per_expert", "forward"),
                ("fused_per_expert", "backward"),
                ("fused_expert_pairs", "forward"),
                ("fused_per_expert reduce", "forward"),
                ("gemm_then_fused", "forward"),
                ("gemm_then_fused", "backward"),
            ):
                assert (kernel, direction, arch, dtype) in seen
            for kernel in ("fused_per_expert", "gemm_then_fused"):
                assert (kernel, "forward", arch, f"{dtype}, saving") in seen
                assert (kernel, "forward", arch, f"{dtype}, largest, saving") in seen
                assert (kernel, "backward", arch, f"{dtype}, largest") in seen
        assert {("gemm_then_fused", "forward", arch, "tf32x3"), ("gemm_then_fused", "backward", arch, "tf32x3")} <= seen
    assert {("fused_per_expert", "forward", 90, "tf32x3"), ("fused_per_expert", "backward", 90, "tf32x3")} <= seen
    # Where `kar_kernels.dispatch` gives exact float32 to `gemm_then_fused`, nothing else is compiled.
    assert {one.kernel for one in compiled if one.arch == 80 and one.variant.startswith("tf32x3")} == {
        "gemm_then_fused"
    }


def test_hopper_multiplies_by_warp_group(compiled):
    # One HGMMA does the work of many HMMA: with the older instruction there were as many as on the older chip.
    count = {(one.kernel, one.arch): one.tensor_core_instructions for one in compiled if one.variant == "bf16"}
    for kernel in ("fused_per_expert", "fused_expert_pairs"):
        assert count[kernel, 90] < count[kernel, 80]


def test_interpreted_kernels_are_not_compiled(tmp_path):
    file = tmp_path / "compiled.json"
    done = run(file, TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr == "TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled\n"
    assert not file.exists()


def test_a_forgotten_file_is_told_before_anything_is_compiled():
    done = run(TRITON_INTERPRET="0")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "FILE" in done.stderr
