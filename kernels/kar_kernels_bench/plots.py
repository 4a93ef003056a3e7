"""Owns the GPU benchmark's pictures: speed-ups over the loop, and achieved speed against the roofline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.figure import Figure

__all__ = ["write_plots"]

matplotlib.use("Agg")
COLORS: Final = {
    "eager": "#9aa0a6",
    "compiled": "#c58af9",
    "concatenated": "#f6ae2d",
    "compiled concatenated": "#f26419",
    "bare products": "#5f6368",
    "fused_per_expert": "#1a73e8",
    "fused_expert_pairs": "#0b3d91",
    "gemm_then_fused": "#12a150",
}


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """`speedup.png` and `roofline.png`; rows without a measurement are left out."""
    rows = [row for row in report["cuda"] if row["direction"] == "forward"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    found = [_speedup([row for row in rows if row["dtype"] == dtypes[0]], report["device"], folder / "speedup.png")]
    found.append(_roofline(rows, report, folder / "roofline.png"))
    return found


def _speedup(rows: list[dict[str, Any]], device: str, path: Path) -> Path:
    """Bars: each form's speed-up over the loop of the same dtype, the better of bare and graph."""
    sizes = sorted({(row["dim"], row["users"], row["batch"]) for row in rows})
    figure = Figure(figsize=(max(7.0, 1.2 * len(sizes) + 2), 4.6), layout="constrained")
    axes = figure.subplots()
    names = [name for name in COLORS if any(row["implementation"] == name for row in rows)]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        best = [
            max(
                (
                    row["speedup_vs_eager_same_dtype"] or np.nan
                    for row in rows
                    if row["implementation"] == name and (row["dim"], row["users"], row["batch"]) == size
                ),
                default=np.nan,
            )
            for size in sizes
        ]
        axes.bar(
            np.arange(len(sizes)) + (number - len(names) / 2 + 0.5) * width, best, width, color=COLORS[name], label=name
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), [f"{users:,} + {batch:,}\nD = {dim}" for dim, users, batch in sizes], fontsize=8)
    axes.set_ylabel("times as fast as the frozen loop")
    axes.set_title(f"Forward, {rows[0]['dtype'] if rows else ''}, {device}; bare or in a graph, whichever is faster")
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(names))
    figure.savefig(path, dpi=130)
    return path


def _roofline(rows: list[dict[str, Any]], report: Mapping[str, Any], path: Path) -> Path:
    """Points: achieved TFLOP/s over operations a byte; lines: the measured limits of this chip."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for style, (dtype, chip) in zip(("-", "--", ":"), report["chip"].items(), strict=False):
        intensity = np.logspace(0, 4, 200)
        allowed = np.minimum(chip["flop_per_s"], intensity * chip["bytes_per_s"]) / 1e12
        axes.plot(intensity, allowed, style, color="black", linewidth=1, label=f"measured roofline, {dtype}")
    for name, color in COLORS.items():
        points = [row for row in rows if row["implementation"] == name]
        if points:
            flop_per_byte = [row["tflop_per_s"] * 1e3 / row["gb_per_s"] for row in points]
            speed = [row["tflop_per_s"] for row in points]
            axes.scatter(flop_per_byte, speed, s=18, color=color, label=name, alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte, nothing moved twice")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Forward on {report['device']}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return path
