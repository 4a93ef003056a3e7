"""Owns the GPU benchmark's comparison: speed-ups of each row, our best implementation over the best baseline, CSV."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kar_kernels_bench.forms import BASELINES, KERNELS

__all__ = ["Verdict", "add_speedups", "verdict", "write_csv"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case, direction and way to launch: our best implementation over the best baseline."""

    users: int
    batch: int
    """Items."""
    dim: int
    dtype: str
    direction: str
    graph: bool
    """Whether both run in CUDA graphs."""
    best_baseline: str
    baseline_ms: float
    best_path: str
    path_ms: float
    speedup: float
    selected: str
    """The implementation that the dispatcher chooses."""
    selected_speedup: float


def _key(row: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Over the frozen loop without a graph, in float32 and in a row's own dtype; None where it was not measured."""
    size = ("users", "batch", "dim", "direction")
    eager = {
        (*_key(row, *size), row["dtype"]): row for row in rows if row["implementation"] == "eager" and not row["graph"]
    }
    for row in rows:
        for name, dtype in (("speedup_vs_eager_fp32", "float32"), ("speedup_vs_eager_same_dtype", row["dtype"])):
            base = eager.get((*_key(row, *size), dtype))
            row[name] = base["median_ms"] / row["median_ms"] if base else None


def verdict(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Our best implementation over the best baseline, for each case, direction and way to launch."""
    comparisons: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        comparisons.setdefault(_key(row, "users", "batch", "dim", "dtype", "direction", "graph"), []).append(row)
    verdicts = []
    for compared in comparisons.values():
        baselines = [row for row in compared if row["implementation"] in BASELINES]
        ours = [row for row in compared if row["implementation"] in KERNELS]
        if not baselines or not ours:
            continue
        baseline, best = (min(group, key=lambda row: row["median_ms"]) for group in (baselines, ours))
        chosen = next((row for row in ours if row["selected"]), best)
        verdicts.append(
            Verdict(
                users=best["users"],
                batch=best["batch"],
                dim=best["dim"],
                dtype=best["dtype"],
                direction=best["direction"],
                graph=best["graph"],
                best_baseline=baseline["implementation"],
                baseline_ms=baseline["median_ms"],
                best_path=best["implementation"],
                path_ms=best["median_ms"],
                speedup=baseline["median_ms"] / best["median_ms"],
                selected=chosen["implementation"],
                selected_speedup=baseline["median_ms"] / chosen["median_ms"],
            )
        )
    return verdicts


def write_csv(rows: Sequence[dict[str, Any]], device_name: str, path: Path) -> None:
    """One line a row, the device's name first."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["device", *names])
        writer.writeheader()
        writer.writerows({"device": device_name, **row} for row in rows)
