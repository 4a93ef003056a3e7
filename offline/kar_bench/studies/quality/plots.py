"""Owns the plots of the quality study."""

import math
from collections.abc import Sequence
from typing import Final

from matplotlib.figure import Figure

from kar_bench.studies.quality.results import ArmSummary, BucketMetrics, CalibrationCurve

__all__ = ["COLOURS", "plot_breakdown", "plot_forest", "plot_reliability"]

COLOURS: Final = {
    "control": "#9aa5b1",
    "raw_text": "#4c9be8",
    "knowledge": "#e4572e",
    "neutral": "#e9b44c",
    "cf": "#2a9d8f",
    "cf_knowledge": "#7b2d8b",
}
"""By arm, in the order of legends."""
FOREST: Final = ("raw_text", "knowledge")
"""Arms of the plot of differences."""
LEAST_SAMPLES: Final = 100
"""A bucket with fewer samples is not drawn: its noise would set the scale."""


def plot_forest(summary: Sequence[ArmSummary]) -> Figure:
    """The difference of each model to its control, with the 95 % interval."""
    models = list(dict.fromkeys(entry.model for entry in summary))
    figure = Figure(figsize=(6.4, 1.2 + 0.42 * len(models)), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(FOREST):
        for entry in summary:
            if entry.arm == arm and (control := entry.minus.get("control")):
                mean, low, high = (1e4 * value for value in (control.mean, control.low, control.high))
                height = models.index(entry.model) + (number - 0.5) * 0.3
                error = [[mean - low], [high - mean]]
                axes.errorbar(mean, height, xerr=error, fmt="o", color=COLOURS[arm], capsize=3, label=arm)
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    axes.legend(by_label.values(), by_label.keys(), frameon=False, fontsize=8)
    axes.axvline(0, color="#9aa5b1", linewidth=1)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("AUC (rerankers: MAP) minus the control's, in 1e-4")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_reliability(calibration: Sequence[CalibrationCurve], model: str) -> Figure:
    """Share of positives against mean score, in bins of equally many samples."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#9aa5b1", linewidth=1, linestyle=":")
    for curve in calibration:
        if curve.model == model:
            axes.plot(curve.score, curve.rate, ".-", color=COLOURS[curve.arm], label=curve.arm)
    axes.set(xlabel="mean score", ylabel="share of positives")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_breakdown(breakdowns: Sequence[BucketMetrics], model: str, by: str) -> Figure:
    """AUC of each arm minus the control's, in each bucket with at least `LEAST_SAMPLES` samples."""
    drawn = [
        bucket for bucket in breakdowns if (bucket.model, bucket.by) == (model, by) and bucket.samples >= LEAST_SAMPLES
    ]
    control = {bucket.bucket: bucket.auc for bucket in drawn if bucket.arm == "control"}
    arms = [arm for arm in COLOURS if arm != "control" and any(bucket.arm == arm for bucket in drawn)]
    samples = {bucket.bucket: bucket.samples for bucket in drawn if bucket.bucket in control}
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(arms):
        auc = {bucket.bucket: bucket.auc for bucket in drawn if bucket.arm == arm}
        differences = [(auc.get(name, math.nan) - control[name]) * 1e4 for name in samples]
        shift = (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
        places = [place + shift for place in range(len(samples))]
        axes.bar(places, differences, 0.72 / len(arms), color=COLOURS[arm], label=arm)
    labels = [f"{name}\n{count:,}" for name, count in samples.items()]
    axes.axhline(0, color="#9aa5b1", linewidth=1)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel=f"{by.replace('_', ' ')} (and samples)", ylabel="AUC minus control, 1e-4")
    axes.legend(frameon=False, fontsize=8, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
