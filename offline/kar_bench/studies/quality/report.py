"""Owns how the quality study is shown: tables in the terminal, and a page with plots in one HTML file."""

import base64
import io
from importlib import resources
from pathlib import Path
from typing import Final

import jinja2
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from kar_bench.harness import difference_text, new_table, notes
from kar_bench.studies.quality.plots import COLOURS, plot_breakdown, plot_forest, plot_reliability
from kar_bench.studies.quality.results import ArmSummary, BucketMetrics, ListMetrics, QualityReport

__all__ = ["quality_table", "write_quality_report"]

DETAILED: Final = ("dcnv2", "din")
"""Models whose breakdowns and calibration are on the page."""


def quality_table(report: QualityReport) -> Group:
    """Mean metrics of every model and arm, and the difference to the control, ready to print."""
    title = f"{report.dataset}: {report.test.samples:,} samples of {report.test.users:,} test users"
    difference = ("- control, 1e-4", "Holm p")
    click_models = new_table(title, ("model", "arm"), ("AUC", "LogLoss", "GAUC", "ECE", *difference))
    rerankers = new_table("lists", ("model", "arm"), ("MAP", "NDCG", *difference))
    former = ""
    for entry in report.summary:
        if former not in ("", entry.model):
            click_models.add_section()
        former = entry.model
        table = rerankers if isinstance(entry.metrics, ListMetrics) else click_models
        _add_row(table, entry)
    tables = [table for table in (click_models, rerankers) if table.row_count]
    return Group(*tables, *notes([f"- {caveat}" for caveat in report.caveats], style="dim"))


def _add_row(table: Table, entry: ArmSummary) -> None:
    control = entry.minus.get("control")
    compared = [difference_text(control), f"{control.p_holm:.3f}"] if control else ["", ""]
    table.add_row(entry.model, entry.arm, *(f"{value:.4f}" for value in entry.metrics), *compared)


def write_quality_report(report: QualityReport, path: Path, command: str = "") -> None:
    """Write the page, one HTML file that refers to nothing outside; `command` is the command that made the report."""
    template = resources.files(__package__).joinpath("quality.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    detailed = [model for model in DETAILED if any(curve.model == model for curve in report.calibration)]
    plots = [("Difference to the control", _embedded(plot_forest(report.summary)))]
    for model in detailed:
        plots.append((f"Reliability of {model}", _embedded(plot_reliability(report.calibration, model))))
        for by in dict.fromkeys(bucket.by for bucket in report.breakdowns):
            title = f"{model} by {by.replace('_', ' ')}"
            plots.append((title, _embedded(plot_breakdown(report.breakdowns, model, by))))
    buckets: dict[tuple[str, str, str], dict[str, BucketMetrics]] = {}
    for bucket in report.breakdowns:
        if bucket.model in detailed:
            buckets.setdefault((bucket.model, bucket.by, bucket.bucket), {})[bucket.arm] = bucket
    page = environment.from_string(template).render(
        report=report,
        command=command,
        plots=plots,
        difference_text=difference_text,
        buckets=buckets,
        arms=[arm for arm in COLOURS if any(arm in by_arm for by_arm in buckets.values())],
        click_models=[entry for entry in report.summary if not isinstance(entry.metrics, ListMetrics)],
        rerankers=[entry for entry in report.summary if isinstance(entry.metrics, ListMetrics)],
    )
    path.write_text(page)


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
