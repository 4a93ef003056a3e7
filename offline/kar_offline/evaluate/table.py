"""Owns how an evaluation is printed: its two tables and the caveats."""

from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kar_offline.evaluate.report import NEUTRAL, EvaluationReport

__all__ = ["evaluation_table"]

LABELS: Final = {
    "control": "",
    "raw_text": "+ raw text",
    "knowledge": "+ LLM knowledge",
    NEUTRAL: "+ LLM knowledge, none given",
}
"""By arm; each follows the backbone's name."""


def evaluation_table(report: EvaluationReport) -> Group:
    """The metrics, the AUC differences and the caveats of an evaluation, ready to print."""
    metrics = Table(title=f"{report.test.samples:,} samples of {report.test.users} test users")
    metrics.add_column("model")
    for column in ("AUC", "LogLoss", "GAUC", "calibration"):
        metrics.add_column(column, justify="right")
    differences = Table(title="AUC differences in 1e-4 (95 % paired bootstrap)")
    differences.add_column("model")
    for column in ("difference", "mean", "interval"):
        differences.add_column(column, justify="right")
    for backbone, arms in report.auc.items():
        for arm in arms:
            values = (by_arm[backbone][arm] for by_arm in (report.auc, report.logloss, report.gauc, report.calibration))
            metrics.add_row(f"{backbone} {LABELS[arm]}".rstrip(), *(f"{value:.4f}" for value in values))
        metrics.add_section()
        for name, interval in report.intervals[backbone].items():
            mean, low, high = (round(value * 1e4) for value in (interval.mean, interval.low, interval.high))
            differences.add_row(backbone, name.replace("_minus_", " - "), f"{mean:+d}", f"[{low:+d}, {high:+d}]")
        differences.add_section()
    caveats = [Text(f"- {caveat}", style="dim") for caveat in report.caveats]
    return Group(metrics, differences, *caveats)
