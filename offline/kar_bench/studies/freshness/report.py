"""Owns how the study of freshness is shown: a table, and plots of AUC and cost against the budget."""

from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group

from kar_bench.harness import difference_text, new_table, notes
from kar_bench.studies.freshness.measure import FreshnessReport, FreshnessSummary
from kar_bench.studies.freshness.study import CONTROL, NEVER_IMPUTED, FreshnessVariant
from kar_bench.studies.quality.plots import COLOURS
from kar_offline.evaluate.metrics import Interval

__all__ = ["freshness_table", "write_freshness_plot"]

CURVES: Final = {
    ("knowledge", "never"): ("knowledge: texts about items, none imputed", "#e4572e", "o"),
    ("knowledge", "served"): ("the same, imputed when served", "#e9b44c", "v"),
    ("knowledge", "trained"): ("the same, imputed in training, too", "#7b2d8b", "^"),
    ("paper", "never"): ("paper: texts about items and users", "#2a9d8f", "s"),
}
"""Label, colour and marker of each curve, by arm and imputation."""


def _budget(calls: int | None) -> str:
    return "any" if calls is None else str(calls)


def freshness_table(report: FreshnessReport) -> Group:
    """Calls, cost and quality of each budget, ready to print."""
    month = report.month
    title = (
        f"{report.dataset}, {report.model}: {month.days} days, {month.test_events:,} events of {month.users:,} users"
    )
    table = new_table(title, ("arm", "imputed"), ("a day", "calls", "USD", "AUC", "- control, 1e-4", "- no_calls"))
    former = ""
    for entry in report.summary:
        variant, spending = entry.variant, entry.spending
        if former not in ("", variant.arm):
            table.add_section()
        former = variant.arm
        minus = [difference_text(entry.minus[name]) if name in entry.minus else "" for name in ("control", "no_calls")]
        usd = f"{spending.usd_before + spending.usd:.2f}"
        numbers = [_budget(variant.budget), f"{_calls(entry):,}", usd, f"{entry.metrics.auc:.4f}"]
        table.add_row(variant.arm, variant.imputation, *numbers, *minus)
    return Group(table, *notes([f"- {caveat}" for caveat in report.caveats], style="dim"))


def _calls(entry: FreshnessSummary) -> int:
    """All calls, in the month and before."""
    return entry.spending.calls_before + sum(entry.spending.calls.values())


def plot_freshness(report: FreshnessReport) -> Figure:
    """AUC of the month against the calls a day, with 95 % intervals of the differences to no calls, and the cost."""
    summary = {entry.variant: entry for entry in report.summary}
    budgets = list(dict.fromkeys(variant.budget for variant in summary if variant.arm != CONTROL))
    budgets.sort(key=lambda budget: (budget is None, budget))
    figure = Figure(figsize=(6.8, 6.0), layout="constrained")
    quality, cost = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    control = summary[FreshnessVariant(CONTROL, 0)].metrics.auc
    quality.axhline(control, color=COLOURS[CONTROL], linewidth=1.2, linestyle="--", label="control: no texts")
    for number, ((arm, imputation), (label, colour, marker)) in enumerate(CURVES.items()):
        if not any((variant.arm, variant.imputation) == (arm, imputation) for variant in summary):
            continue
        # Without calls no vector is imputed, and with any number hardly any: the curves of an arm share their ends.
        entries = [
            summary[FreshnessVariant(arm, budget, imputation if budget else NEVER_IMPUTED)] for budget in budgets
        ]
        minus = [entry.minus.get("no_calls", Interval(0, 0, 0)) for entry in entries]
        error = [[found.mean - found.low for found in minus], [found.high - found.mean for found in minus]]
        places = [place + 0.06 * (number - 1.5) for place in range(len(budgets))]  # side by side
        auc = [entry.metrics.auc for entry in entries]
        quality.errorbar(places, auc, yerr=error, fmt=f"{marker}-", color=colour, capsize=2, linewidth=1.4, label=label)
        if imputation == NEVER_IMPUTED:
            _draw_cost(cost, entries, 0.19 if arm == "paper" else -0.19, colour)
    quality.set_ylabel("AUC of the month")
    cost.set(xlabel="calls to the language model a day", ylabel="cost, USD (pale: before the\nmonth; above: all calls)")
    cost.set_xticks(range(len(budgets)), ["none" if budget == 0 else _budget(budget) for budget in budgets])
    cost.margins(y=0.12)
    quality.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axes in (quality, cost):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_cost(axes: Axes, entries: list[FreshnessSummary], shift: float, colour: str) -> None:
    places = [place + shift for place in range(len(entries))]
    before = [entry.spending.usd_before for entry in entries]
    axes.bar(places, before, 0.36, color=colour, alpha=0.4)
    bars = axes.bar(places, [entry.spending.usd for entry in entries], 0.36, before, color=colour)
    axes.bar_label(bars, [f"{_calls(entry):,}" for entry in entries], fontsize=8)


def write_freshness_plot(report: FreshnessReport, path: Path) -> None:
    """Write the plot in the format that the file's name ends with."""
    plot_freshness(report).savefig(path, dpi=140)
