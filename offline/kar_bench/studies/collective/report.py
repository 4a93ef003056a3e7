"""Owns how the study of collective knowledge is shown: a table, and a plot of AUC against calls."""

from pathlib import Path
from typing import Final

from matplotlib.figure import Figure
from rich.console import Group

from kar_bench.harness import difference_text, new_table, notes
from kar_bench.studies.collective.measure import CollectiveReport
from kar_bench.studies.quality.plots import COLOURS

__all__ = ["collective_table", "write_collective_plot"]

CURVES: Final = {
    ("both_texts", "head"): ("raw text beside: frequent items, then clusters", "#7b2d8b", "s"),
    ("knowledge", "head"): ("frequent items, then clusters", "#e4572e", "o"),
    ("knowledge", "clusters"): ("clusters", "#e9b44c", "^"),
    ("knowledge", "nearest"): ("clusters, imputed from the nearest one alone", "#2a9d8f", "v"),
}
"""Label, colour and marker of each curve, by arm and way."""


def collective_table(report: CollectiveReport) -> Group:
    """Calls and quality of all variants, ready to print."""
    folds = f"{report.folds} folds, {report.test_users:,} test users"
    title = f"{report.dataset}, {report.model}: calls about {report.entities['item']:,} items; {folds}"
    table = new_table(title, ("arm", "texts"), ("calls", "AUC", "GAUC", "- control, 1e-4", "- raw_text"))
    former = ""
    for entry in report.summary:
        if former not in ("", entry.variant.way):
            table.add_section()
        former = entry.variant.way
        minus = [difference_text(entry.minus[name]) if name in entry.minus else "" for name in ("control", "raw_text")]
        numbers = [f"{entry.item_calls:,.0f}", f"{entry.auc:.4f}", f"{entry.gauc:.4f}"]
        table.add_row(entry.variant.arm, entry.variant.way, *numbers, *minus)
    return Group(table, *notes(["Released texts stand in for a language model."], style="dim"))


def plot_collective(report: CollectiveReport) -> Figure:
    """AUC against the share of calls, with the 95 % intervals of the differences to the control."""
    summary = report.summary
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for entry in summary:
        if not entry.variant.share:
            arm = entry.variant.arm
            axes.axhline(entry.auc, color=COLOURS[arm], linewidth=1.2, linestyle="--", label=f"no calls: {arm}")
    for number, ((arm, way), (label, colour, marker)) in enumerate(CURVES.items()):
        points = sorted(
            (
                entry
                for entry in summary
                if entry.variant.arm == arm and (entry.variant.way == way or entry.variant.share == 1)
            ),
            key=lambda entry: entry.variant.share,
        )
        if len(points) < 2:
            continue
        minus = [entry.minus["control"] for entry in points]
        error = [[found.mean - found.low for found in minus], [found.high - found.mean for found in minus]]
        places = [100 * entry.variant.share * 1.03 ** (number - 1.5) for entry in points]  # side by side
        auc = [entry.auc for entry in points]
        axes.errorbar(places, auc, yerr=error, fmt=f"{marker}-", color=colour, capsize=2, linewidth=1.4, label=label)
    shares = sorted({entry.variant.share for entry in summary if entry.variant.share})
    axes.set_xscale("log")
    axes.set_xticks([100 * share for share in shares], [f"{100 * share:g} %" for share in shares])
    axes.minorticks_off()
    axes.set(xlabel="calls to the language model, of the number of items", ylabel="AUC")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_collective_plot(report: CollectiveReport, path: Path) -> None:
    """Write the plot in the format that the file's name ends with."""
    plot_collective(report).savefig(path, dpi=140)
