"""`kar bench kernels` on a processor, with triton and without."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from tests.support.paths import ROOT

pytestmark = pytest.mark.service

WITHOUT_TRITON = """
from importlib import machinery

find_spec = machinery.PathFinder.find_spec


def without_triton(name, path=None, target=None):
    return None if name.partition(".")[0] == "triton" else find_spec(name, path, target)


machinery.PathFinder.find_spec = without_triton
"""
"""Python runs it at its start, in this process and in those that it starts."""
BENCHMARK = """
import json, sys
from pathlib import Path
from rich.console import Console
from kar_bench.performance.kernels import Device, measure_kernels, write_docs
from kar_kernels_bench.processor import ProcessorPlan

if __name__ == "__main__":
    plan = ProcessorPlan((1, 2), seconds=0.001, prestored=((20, 64),), compiled=False, patience_s=0)
    report = measure_kernels(Device.CPU, Console(width=200), plan=plan)
    write_docs(report, Path("kernels.md"))
    Path("report.json").write_text(json.dumps(report))
    assert "triton" not in sys.modules
"""
PAGE = """
<!-- aot -->

figures of a machine with triton

<!-- /aot -->
<!-- roofline -->
<!-- /roofline -->
<!-- cpu -->
<!-- /cpu -->
<!-- prestoring -->
<!-- /prestoring -->
"""


def test_a_processor_needs_no_triton(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TRITON)
    (tmp_path / "benchmark.py").write_text(textwrap.dedent(BENCHMARK))
    (tmp_path / "kernels.md").write_text(PAGE)
    folders = [str(tmp_path), *(str(ROOT / name) for name in ("protos", "kernels", "sidecar", "offline"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "benchmark.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {(row["batch"], row["implementation"]) for row in report["cpu"]} == {
        (batch, name) for batch in (1, 2) for name in ("eager", "concatenated", "cpu")
    }
    assert {(row["rows"], row["dim"]) for row in report["prestoring"]} == {(20, 64)}
    assert report["aot"] == []
    assert "triton is not installed: GPU kernels were left out" in done.stdout
    assert "pip install 'kar-sidecar[gpu]'" in done.stdout
    assert "figures of a machine with triton" in (tmp_path / "kernels.md").read_text()
