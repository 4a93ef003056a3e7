"""Owns `python -m kar_kernels_bench`: the GPU benchmark where only torch, triton and safetensors are installed.

    python -m kar_kernels_bench FOLDER [--tiny] [--budget SECONDS]

Checks every kernel against float64, then writes cuda.json, cuda.csv, verdict.csv and, where matplotlib is installed,
plots into FOLDER, and prints the verdict. `kar bench kernels` does the same with the rest of the product around it.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from kar_kernels.dispatch import KERNELS
from kar_kernels_bench.gpu import measure_gpu
from kar_kernels_bench.machine import machine
from kar_kernels_bench.report import device_name
from kar_kernels_bench.verdict import verdict, write_csv
from kar_kernels_bench.verification import check


def main() -> int:
    """Run it; 1 if a kernel is wrong or breaks down."""
    parser = argparse.ArgumentParser(prog="python -m kar_kernels_bench")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small sizes; without a GPU, kernels are interpreted")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds; cases not begun by then are left out")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        return _fail("there is no CUDA device here: use --tiny to try the benchmark with interpreted kernels")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return _fail("without a CUDA device, kernels must be interpreted: set TRITON_INTERPRET=1")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    wrong = check(device, tiny=options.tiny, on_row=_say)
    if wrong:
        return _fail("\n".join(("kernels differ from float64 by more than rounding explains:", *wrong)))
    print("every kernel differs from float64 by no more than rounding explains", file=sys.stderr)
    report = measure_gpu(device, tiny=options.tiny, budget_s=options.budget, on_row=_say)
    name = device_name(device)
    verdicts = verdict(report["cuda"])
    table = [asdict(row) for row in verdicts]
    report |= {"device": name, "machine": machine(), "torch": torch.__version__, "tiny": options.tiny, "verdict": table}
    (options.folder / "cuda.json").write_text(json.dumps(report, indent=1) + "\n")
    write_csv(report["cuda"], name, options.folder / "cuda.csv")
    write_csv(table, name, options.folder / "verdict.csv")
    try:
        from kar_kernels_bench.plots import write_plots
    except ImportError:
        print("matplotlib is not installed: no plots", file=sys.stderr)
    else:
        write_plots(report, options.folder)
    print(f"{name}, torch {torch.__version__}: operator over the best unfused baseline")
    for row in verdicts:
        way = "graph" if row.graph else "bare"
        print(
            f"{row.users:>7,} + {row.batch:>9,}  D {row.dim:>4}  {row.dtype:<8}  {row.direction:<8}  {way:<5}  "
            f"{row.best_path:<18} {row.path_ms:10.4f} ms  {row.best_baseline:<21} {row.baseline_ms:10.4f} ms  "
            f"{row.speedup:5.2f}x  (chosen {row.selected}: {row.selected_speedup:.2f}x)"
        )
    for label in report["left_out"]:
        print(f"not measured, out of time: {label}")
    for text in report["failed"]:
        print(f"failed: {text}")
    return 1 if any(f", {path}:" in text for text in report["failed"] for path in KERNELS) else 0


def _say(text: str) -> None:
    print(f"\r\033[K{text}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
