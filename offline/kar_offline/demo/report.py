"""Owns the demo's report page: two plots and their tables, in one HTML file without external references."""

import base64
import io
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jinja2
import matplotlib
from matplotlib.figure import Figure

from kar_offline.replay.report import STAGES

__all__ = ["plot_auc", "plot_latency", "write_report"]

ARMS: Final = {"control": "#9aa5b1", "raw_text": "#4c9be8", "knowledge": "#e4572e"}
PERCENTILES: Final = ("p50_ms", "p95_ms", "p99_ms")


def plot_auc(auc: Mapping[str, Mapping[str, float]]) -> Figure:
    """Test AUC of each arm, grouped by backbone; the axis does not start at 0, which its label says."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    values = [value for arms in auc.values() for value in arms.values()]
    low, high = min(values), max(values)
    margin = max(0.002, 0.25 * (high - low))
    width = 0.8 / len(ARMS)
    for position, arms in enumerate(auc.values()):
        for number, (arm, colour) in enumerate(ARMS.items()):
            if arm in arms:
                x = position + (number - 1) * width
                axes.bar(x, arms[arm], width * 0.92, color=colour, label=arm if position == 0 else None)
                axes.annotate(
                    f"{arms[arm]:.4f}", (x, arms[arm]), (0, 2), textcoords="offset points", ha="center", size=8
                )
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.set_xticks(range(len(auc)), list(auc))
    axes.set_ylabel("AUC on test users (axis is cut)")
    axes.legend(frameon=False, ncols=len(ARMS), loc="upper left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_latency(stages: Mapping[str, Mapping[str, float]]) -> Figure:
    """Milliseconds of each server stage at the 50th, 95th and 99th percentile."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(PERCENTILES)
    largest = max(stages[stage]["p99_ms"] for stage in STAGES)
    for number, (percentile, shade) in enumerate(zip(PERCENTILES, ("#1f4e79", "#4c9be8", "#b8d8f8"), strict=True)):
        for row, stage in enumerate(STAGES):
            value = stages[stage][percentile]
            y = row + (number - 1) * height
            axes.barh(y, value, height * 0.92, color=shade, label=percentile[:3] if row == 0 else None)
            axes.annotate(f"{value:.2f}", (value, y), (3, 0), textcoords="offset points", va="center", size=7)
    axes.set_yticks(range(len(STAGES)), STAGES)
    axes.invert_yaxis()
    axes.set_xlim(0, largest * 1.15 or 1)
    axes.set_xlabel("milliseconds in the server")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(PERCENTILES), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(summary: Mapping[str, Any], path: Path) -> None:
    """Write the report page of a demo run from the content of its `summary.json`."""
    template = resources.files(__package__).joinpath("report.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    with matplotlib.rc_context({"svg.hashsalt": "kar"}):
        page = environment.from_string(template).render(
            summary=summary,
            arms=list(ARMS),
            stages=STAGES,
            percentiles=PERCENTILES,
            auc_plot=_image(plot_auc(summary["auc"])),
            latency_plot=_image(plot_latency(summary["serve"]["stages"])),
        )
    path.write_text(page)
