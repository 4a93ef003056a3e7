"""Owns how an evaluation reads: its two tables and the caveats."""

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kar_offline.evaluate.stage import NEUTRAL

__all__ = ["evaluation_table"]

ROWS: Final = {
    "control": "",
    "raw_text": "+ raw text",
    "knowledge": "+ LLM knowledge",
    NEUTRAL: "+ LLM knowledge, none given",
}


def evaluation_table(report: Mapping[str, Any]) -> Group:
    """The tables of an evaluation report, and what to keep in mind when reading them, ready to print."""
    size = report["test"]
    table = Table(title=f"{size['samples']:,} samples of {size['users']} test users")
    table.add_column("model")
    for column in ("AUC", "LogLoss", "GAUC", "calibration"):
        table.add_column(column, justify="right")
    differences = Table(title="AUC differences in 1e-4 (95 % paired bootstrap)")
    differences.add_column("model")
    for column in ("difference", "mean", "interval"):
        differences.add_column(column, justify="right")
    for backbone, arms in report["auc"].items():
        for arm in arms:
            numbers = [report[metric][backbone][arm] for metric in ("auc", "logloss", "gauc", "calibration")]
            label = f"{backbone} {ROWS[arm]}".rstrip()
            table.add_row(label, *(f"{number:.4f}" for number in numbers))
        table.add_section()
        for name, interval in report["intervals"][backbone].items():
            mean, low, high = (round(interval[key] * 1e4) for key in ("mean", "low", "high"))
            differences.add_row(backbone, name.replace("_minus_", " - "), f"{mean:+d}", f"[{low:+d}, {high:+d}]")
        differences.add_section()
    caveats = [Text(f"- {caveat}", style="dim") for caveat in report["caveats"]]
    return Group(table, differences, *caveats)
