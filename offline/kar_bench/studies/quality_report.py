"""Owns how a quality report looks: the table in the terminal, and a page with plots in one HTML file."""

import base64
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

import jinja2
from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kar_bench.studies.quality import LIST_METRICS, METRICS

__all__ = [
    "collective_table",
    "direct_table",
    "freshness_table",
    "modes_table",
    "quality_table",
    "training_table",
    "write_collective_plot",
    "write_freshness_plot",
    "write_quality_report",
]

COLOURS: Final = {
    "control": "#9aa5b1",
    "raw_text": "#4c9be8",
    "knowledge": "#e4572e",
    "neutral": "#e9b44c",
    "cf": "#2a9d8f",
    "cf_knowledge": "#7b2d8b",
}
FOREST: Final = ("raw_text", "knowledge")
CURVES: Final = {
    ("both_texts", "head"): ("raw text beside: frequent items, then clusters", "#7b2d8b", "s"),
    ("knowledge", "head"): ("frequent items, then clusters", "#e4572e", "o"),
    ("knowledge", "clusters"): ("clusters", "#e9b44c", "^"),
    ("knowledge", "nearest"): ("clusters, of which only the nearest lends", "#2a9d8f", "v"),
}
"""What is drawn of shared calls, by arm and way: label, colour, marker."""
MONTH: Final = {
    ("knowledge", "never"): ("knowledge: texts about items, no loans", "#e4572e", "o"),
    ("knowledge", "served"): ("the same, loans when served", "#e9b44c", "v"),
    ("knowledge", "trained"): ("the same, loans in training, too", "#7b2d8b", "^"),
    ("paper", "never"): ("paper: texts about items and users", "#2a9d8f", "s"),
}
"""What is drawn of a simulated month, by arm and loans: label, colour, marker."""
IDLE_CORES: Final = 0.2
FEWEST: Final = 100
"""Samples of a bucket that is drawn: the noise of fewer would set the scale."""


def _signed(found: Mapping[str, float]) -> str:
    return f"{found['mean'] * 1e4:+.0f} [{found['low'] * 1e4:+.0f}, {found['high'] * 1e4:+.0f}]"


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table that fits into 80 columns without breaking a number."""
    table = Table(title=title, box=box.SIMPLE, padding=0)
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def quality_table(report: Mapping[str, Any]) -> Group:
    """Mean metrics of every model and arm, and the difference to the control, ready to print."""
    size = report["test"]
    title = f"{report['dataset']}: {size['samples']:,} samples of {size['users']:,} test users"
    table = _table(title, ("model", "arm"), ("AUC", "LogLoss", "GAUC", "ECE", "- control, 1e-4", "Holm p"))
    last = ""
    for entry in report["summary"]:
        if last not in ("", entry["model"]):
            table.add_section()
        last = entry["model"]
        if "map" in entry:
            continue
        numbers = [f"{entry[name]:.4f}" for name in METRICS]
        control = entry["minus"].get("control")
        more = [_signed(control), f"{control['p_holm']:.3f}"] if control else ["", ""]
        table.add_row(entry["model"], entry["arm"], *numbers, *more)
    ranked = _table("lists", ("model", "arm"), ("MAP", "NDCG", "- control, 1e-4", "Holm p"))
    for entry in report["summary"]:
        if "map" in entry:
            control = entry["minus"].get("control")
            more = [_signed(control), f"{control['p_holm']:.3f}"] if control else ["", ""]
            ranked.add_row(entry["model"], entry["arm"], *(f"{entry[n]:.4f}" for n in LIST_METRICS), *more)
    tables = [one for one in (table, ranked) if one.row_count]
    return Group(*tables, *(Text(f"- {caveat}", style="dim") for caveat in report["caveats"]))


def training_table(report: Mapping[str, Any]) -> Group:
    """Samples a second of every implementation, and what follows from them, ready to print."""
    title = f"{report['dataset']}: thousand samples a second, one thread"
    table = _table(title, ("model", "arm", "implementation"), ("train", "score"))
    rates: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in report["rows"]:
        of_phases = rates.setdefault((row["model"], row["arm"], row["implementation"]), {})
        rate, low, high = (f"{row[name] / 1e3:.1f}" for name in ("samples_per_s", "low", "high"))
        of_phases[row["phase"]] = f"{rate} [{low}, {high}]"
    last = ""
    for (model, arm, implementation), of_phases in rates.items():
        if last not in ("", model):
            table.add_section()
        last = model
        table.add_row(model, arm, implementation, of_phases["train"], of_phases["score"])
    lines = []
    for found in report["ratios"]:
        faster = {name: value for name, value in found.items() if isinstance(value, float)}
        lines.append(f"{found['model']} {found['phase']}: " + ", ".join(f"{k} {v:.2f}x" for k, v in faster.items()))
    folds: dict[str, list[float]] = {}
    for one in report["auc"]:
        folds.setdefault(f"{one['model']} {one['implementation']}", []).append(one["auc"])
    for name, found in folds.items():
        each = ", ".join(f"{auc:.4f}" for auc in found)
        lines.append(f"{name}: test AUC {statistics.fmean(found):.4f} (by fold: {each})")
    busy = max(report["others_busy_cores"].values())
    if busy > IDLE_CORES:
        lines.append(f"others kept {busy:.1f} cores busy: measure again on an idle machine")
    return Group(table, *(Text(line) for line in lines))


def direct_table(report: Mapping[str, Any]) -> Group:
    """How a language model and ours rank the same lists, ready to print."""
    title = f"{report['dataset']}: {report['lists']} lists of 10, one request each"
    table = _table(title, ("ranker",), ("MAP", "NDCG", "hits at 1", "p50, ms", "p99, ms", "named all"))
    for row in report["rows"]:
        times = [f"{row[name]:,.1f}" if name in row else "" for name in ("p50_ms", "p99_ms")]
        complete = f"{row['complete']:.0%}" if "complete" in row else ""
        quality = [f"{row[name]:.4f}" for name in ("map", "ndcg", "hits_at_1")]
        table.add_row(row["ranker"], *quality, *times, complete)
    return Group(table, Text("A toy: the model is one that runs anywhere.", style="dim"))


def modes_table(report: Mapping[str, Any]) -> Group:
    """What each serving mode costs: latency, bytes, and time to a new model, ready to print."""
    title = f"{report['dataset']}: {report['requests']:,} requests each, one client, ms"
    latency = _table(title, ("candidates", "mode"), ("p50", "p95", "p99", "errors"))
    for row in report["rows"]:
        times = [f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms")]
        latency.add_row(str(row["candidates"]), row["mode"], *times, str(row["errors"]))
    brought = report["checkpoint_to_serving"]
    some = next(iter(brought.values()))
    costs = _table(
        f"bytes an entity, and seconds from trained to serving ({some['model']} after {some['served']})",
        ("mode",),
        ("record", "in LMDB", "export", "publish", "load", "in all"),
    )
    for mode, found in brought.items():
        bytes_ = [f"{report['bytes_per_entity'][mode][name]:,.0f}" for name in ("record_bytes", "lmdb_bytes")]
        seconds = [f"{found[name]:.2f}" for name in ("export_s", "publish_s", "load_s", "total_s")]
        costs.add_row(mode, *bytes_, *seconds)
    lines = [
        f"{mode}: published {found['entities']:,} entities, {found['vectors_per_s']:,.0f} vectors a second; "
        f"a million would take {1e6 / found['vectors_per_s']:,.0f} s"
        for mode, found in brought.items()
        if found["vectors_per_s"]
    ]
    busy = max(report["others_busy_cores"].values())
    if busy > IDLE_CORES:
        lines.append(f"others kept {busy:.1f} cores busy: measure again on an idle machine")
    return Group(latency, costs, *(Text(line) for line in lines))


def collective_table(report: Mapping[str, Any]) -> Group:
    """What fewer calls cost in quality, ready to print."""
    folds = f"{report['folds']} folds, {report['test_users']:,} test users"
    title = f"{report['dataset']}, {report['model']}: calls about {report['entities']['item']:,} items; {folds}"
    table = _table(title, ("arm", "texts"), ("calls", "AUC", "GAUC", "- control, 1e-4", "- raw_text"))
    last = ""
    for entry in report["summary"]:
        if last not in ("", entry["way"]):
            table.add_section()
        last = entry["way"]
        minus = [_signed(entry["minus"][name]) if name in entry["minus"] else "" for name in ("control", "raw_text")]
        numbers = [f"{entry['item_calls']:,.0f}", f"{entry['auc']:.4f}", f"{entry['gauc']:.4f}"]
        table.add_row(entry["arm"], entry["way"], *numbers, *minus)
    return Group(table, Text("Released texts stand in for a language model.", style="dim"))


def plot_collective(report: Mapping[str, Any]) -> Figure:
    """AUC against the share of calls, with the 95 % intervals of the differences to the control."""
    summary = report["summary"]
    alone = {entry["arm"]: entry["auc"] for entry in summary if not entry["share"]}
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm, auc in alone.items():
        axes.axhline(auc, color=COLOURS[arm], linewidth=1.2, linestyle="--", label=f"no calls: {arm}")
    for number, ((arm, way), (label, colour, marker)) in enumerate(CURVES.items()):
        points = sorted((e["share"], e) for e in summary if e["arm"] == arm and (e["way"] == way or e["share"] == 1))
        if len(points) < 2:
            continue
        minus = [entry["minus"]["control"] for _, entry in points]
        auc = [entry["auc"] for _, entry in points]
        error = [[found["mean"] - found["low"] for found in minus], [found["high"] - found["mean"] for found in minus]]
        at = [100 * share * 1.03 ** (number - 1.5) for share, _ in points]  # side by side, not on each other
        axes.errorbar(at, auc, yerr=error, fmt=f"{marker}-", color=colour, capsize=2, linewidth=1.4, label=label)
    shares = sorted({entry["share"] for entry in summary if entry["share"]})
    axes.set_xscale("log")
    axes.set_xticks([100 * share for share in shares], [f"{100 * share:g} %" for share in shares])
    axes.minorticks_off()
    axes.set(xlabel="calls to the language model, of the number of items", ylabel="AUC")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_collective_plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the plot of calls against AUC as a picture of the kind that the file's name says."""
    plot_collective(report).savefig(path, dpi=140)


def _budget(calls: int | None) -> str:
    return "any" if calls is None else str(calls)


def freshness_table(report: Mapping[str, Any]) -> Group:
    """What each budget of calls gives and costs in a simulated month, ready to print."""
    month = report["month"]
    title = (
        f"{report['dataset']}, {report['model']}: {month['days']} days, {month['test_events']:,} events of "
        f"{month['users']:,} users"
    )
    table = _table(title, ("arm", "loans"), ("a day", "calls", "USD", "AUC", "- control, 1e-4", "- no_calls"))
    last = ""
    for entry in report["summary"]:
        if last not in ("", entry["arm"]):
            table.add_section()
        last = entry["arm"]
        minus = [_signed(entry["minus"][name]) if name in entry["minus"] else "" for name in ("control", "no_calls")]
        calls, usd = entry["calls_before"] + sum(entry["calls"].values()), entry["usd_before"] + entry["usd"]
        numbers = [_budget(entry["budget"]), f"{calls:,}", f"{usd:.2f}", f"{entry['auc']:.4f}"]
        table.add_row(entry["arm"], entry["loans"], *numbers, *minus)
    return Group(table, *(Text(f"- {caveat}", style="dim") for caveat in report["caveats"]))


def plot_freshness(report: Mapping[str, Any]) -> Figure:
    """AUC of the month against the calls a day, with 95 % intervals of the differences to no calls, and its cost."""
    summary = {(entry["arm"], entry["loans"], entry["budget"]): entry for entry in report["summary"]}
    budgets = list(dict.fromkeys(budget for arm, _, budget in summary if arm != "control"))
    budgets.sort(key=lambda budget: (budget is None, budget))
    figure = Figure(figsize=(6.8, 6.0), layout="constrained")
    quality, cost = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    control = summary["control", "never", 0]["auc"]
    quality.axhline(control, color=COLOURS["control"], linewidth=1.2, linestyle="--", label="control: no texts")
    for number, ((arm, loans), (label, colour, marker)) in enumerate(MONTH.items()):
        if not any(key[:2] == (arm, loans) for key in summary):
            continue
        # Without calls nobody lends, and with any number nearly nobody borrows: these ends are the same for all.
        entries = [summary[arm, loans if budget else "never", budget] for budget in budgets]
        auc = [entry["auc"] for entry in entries]
        minus = [entry["minus"].get("no_calls", {"mean": 0, "low": 0, "high": 0}) for entry in entries]
        error = [[found["mean"] - found["low"] for found in minus], [found["high"] - found["mean"] for found in minus]]
        at = [place + 0.06 * (number - 1.5) for place in range(len(budgets))]  # side by side, not on each other
        quality.errorbar(at, auc, yerr=error, fmt=f"{marker}-", color=colour, capsize=2, linewidth=1.4, label=label)
        if loans == "never":
            at = [place + (0.19 if arm == "paper" else -0.19) for place in range(len(budgets))]
            earlier = [entry["usd_before"] for entry in entries]
            cost.bar(at, earlier, 0.36, color=colour, alpha=0.4)
            bars = cost.bar(at, [entry["usd"] for entry in entries], 0.36, earlier, color=colour)
            cost.bar_label(bars, [f"{sum(e['calls'].values()) + e['calls_before']:,}" for e in entries], fontsize=8)
    quality.set_ylabel("AUC of the month")
    cost.set(xlabel="calls to the language model a day", ylabel="cost, USD (pale: before the\nmonth; above: all calls)")
    cost.set_xticks(range(len(budgets)), ["none" if budget == 0 else _budget(budget) for budget in budgets])
    cost.margins(y=0.12)
    quality.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axes in (quality, cost):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_freshness_plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the plot of a simulated month as a picture of the kind that the file's name says."""
    plot_freshness(report).savefig(path, dpi=140)


def plot_forest(summary: Sequence[Mapping[str, Any]]) -> Figure:
    """Difference to the control of each model, with its 95 % interval."""
    models = list(dict.fromkeys(entry["model"] for entry in summary))
    figure = Figure(figsize=(6.4, 1.2 + 0.42 * len(models)), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(FOREST):
        for entry in summary:
            if entry["arm"] == arm and "control" in entry["minus"]:
                found = {name: entry["minus"]["control"][name] * 1e4 for name in ("mean", "low", "high")}
                at = models.index(entry["model"]) + (number - 0.5) * 0.3
                error = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
                axes.errorbar(found["mean"], at, xerr=error, fmt="o", color=COLOURS[arm], capsize=3, label=arm)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    axes.legend(named.values(), named.keys(), frameon=False, fontsize=8)
    axes.axvline(0, color="#9aa5b1", linewidth=1)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("AUC (rerankers: MAP) minus the control's, in 1e-4")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_reliability(calibration: Sequence[Mapping[str, Any]], model: str) -> Figure:
    """Share of positives against mean score, in bins of equally many samples."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#9aa5b1", linewidth=1, linestyle=":")
    for entry in calibration:
        if entry["model"] == model:
            axes.plot(entry["score"], entry["rate"], ".-", color=COLOURS[entry["arm"]], label=entry["arm"])
    axes.set(xlabel="mean score", ylabel="share of positives")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_breakdown(breakdowns: Sequence[Mapping[str, Any]], model: str, by: str) -> Figure:
    """AUC of each arm minus the control's in each bucket of at least `FEWEST` samples."""
    chosen = [e for e in breakdowns if e["model"] == model and e["by"] == by and e["samples"] >= FEWEST]
    control = {entry["bucket"]: entry["auc"] for entry in chosen if entry["arm"] == "control"}
    arms = [arm for arm in COLOURS if arm != "control" and any(entry["arm"] == arm for entry in chosen)]
    samples = {entry["bucket"]: entry["samples"] for entry in chosen if entry["bucket"] in control}
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        auc = {entry["bucket"]: entry["auc"] for entry in chosen if entry["arm"] == arm}
        differences = [(auc.get(bucket, math.nan) - control[bucket]) * 1e4 for bucket in samples]
        at = [place + (number - (len(arms) - 1) / 2) * 0.8 / len(arms) for place in range(len(samples))]
        axes.bar(at, differences, 0.72 / len(arms), color=COLOURS[arm], label=arm)
    labels = {place: f"{bucket}\n{count:,}" for place, (bucket, count) in enumerate(samples.items())}
    axes.axhline(0, color="#9aa5b1", linewidth=1)
    axes.set_xticks(list(labels), list(labels.values()), fontsize=8)
    axes.set(xlabel=f"{by.replace('_', ' ')} (and samples)", ylabel="AUC minus control, 1e-4")
    axes.legend(frameon=False, fontsize=8, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_quality_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the page: one HTML file without outside references."""
    template = resources.files(__package__).joinpath("quality.html.j2").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    detailed = [model for model in ("dcnv2", "din") if any(one["model"] == model for one in report["calibration"])]
    plots = [("Difference to the control", _embedded(plot_forest(report["summary"])))]
    for model in detailed:
        plots.append((f"Reliability of {model}", _embedded(plot_reliability(report["calibration"], model))))
        for by in dict.fromkeys(one["by"] for one in report["breakdowns"]):
            title = f"{model} by {by.replace('_', ' ')}"
            plots.append((title, _embedded(plot_breakdown(report["breakdowns"], model, by))))
    buckets: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in report["breakdowns"]:
        if one["model"] in detailed:
            buckets.setdefault((one["model"], one["by"], one["bucket"]), {})[one["arm"]] = one
    arms = [arm for arm in COLOURS if any(arm in bucket for bucket in buckets.values())]
    page = environment.from_string(template).render(
        report=report, plots=plots, signed=_signed, buckets=buckets, arms=arms
    )
    path.write_text(page)
