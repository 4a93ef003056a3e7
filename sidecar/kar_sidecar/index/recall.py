"""Owns the choice of search parameters: the smallest `probes` or `ef_search` whose measured recall is high enough.

Recall at 10 is the share of the ten nearest vectors, by exact inner product of unit vectors, that a search finds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kar_sidecar.errors import InputError
from kar_sidecar.index.config import RECALL_AT, IndexConfig, IndexDescription, MeasuredRecall

__all__ = ["held_out_last", "tune"]

EF_LEAST: Final = 16
EF_MOST: Final = 1024
"""hnsw: range in which `ef_search` is chosen."""
TOLERANCE: Final = 1e-6
"""Cosines that differ by less count as equal, so that either of two equally near vectors is right."""


def held_out_last(count: int, config: IndexConfig) -> tuple[list[int], int]:
    """An order of `count` rows that puts the held-out rows last, and the number of held-out rows.

    Recall is measured with the held-out rows before they are added: a graph finds its own vectors more easily than new
    ones, so recall on its own vectors would be too high.
    """
    if count < 2:
        return list(range(count)), 0
    size = max(1, min(config.sample, count // 10))
    is_held_out = np.zeros(count, np.bool_)
    is_held_out[np.random.default_rng(config.seed).choice(count, size, replace=False)] = True
    return np.argsort(is_held_out, kind="stable").tolist(), size


def tune(
    faiss: Any,
    index: Any,
    description: IndexDescription,
    rows: NDArray[np.float32],
    queries: NDArray[np.float32],
    config: IndexConfig,
) -> IndexDescription:
    """Set the index's search parameters, and complete its description with them and the measured recall.

    Args:
        faiss: The module.
        index: A FAISS index of `rows`.
        description: The index's description without search parameters and recall.
        rows: Its unit vectors [n, dim].
        queries: Unit vectors [m, dim] to measure with; without any, nothing is measured or chosen.
        config: Given parameters and required recall.

    Raises:
        InputError: the recall is below the required one; the text says what to change.
    """
    if not len(queries):
        return replace(description, recall=MeasuredRecall(RECALL_AT, 1.0, config.recall, 0))
    measure = _recall_meter(faiss, index, description.kind, rows, queries)
    value = 0
    if description.kind == "ivf":
        value = config.probes or _smallest(measure, config.recall, 1, index.nlist)
        description = replace(description, probes=value)
    elif description.kind == "hnsw":
        value = config.ef_search or _smallest(measure, config.recall, EF_LEAST, EF_MOST)
        description = replace(description, ef_search=value)
    recall = measure(value)
    if recall < config.recall:
        raise InputError(_advice(description, config, recall))
    return replace(description, recall=MeasuredRecall(RECALL_AT, round(recall, 6), config.recall, len(queries)))


def _recall_meter(
    faiss: Any, index: Any, kind: str, rows: NDArray[np.float32], queries: NDArray[np.float32]
) -> Callable[[int], float]:
    """A function that sets the search parameter of `kind` and measures recall with it."""
    k = min(RECALL_AT, len(rows))
    exact = faiss.knn(queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT)[0]
    kth_cosine = exact[:, -1:]  # (m, 1)

    def measure(value: int) -> float:
        if kind == "ivf":
            index.nprobe = value
        if kind == "hnsw":
            index.hnsw.efSearch = value
        nearest = index.search(queries, k)[1]  # (m, k)
        # Recall compares exact cosines, but a compressed index returns approximate ones: they are computed again.
        cosines = np.where(nearest >= 0, np.einsum("mkd,md->mk", rows[nearest], queries), -np.inf)
        return float((cosines >= kth_cosine - TOLERANCE).mean())

    return measure


def _smallest(measure: Callable[[int], float], required: float, low: int, limit: int) -> int:
    """The smallest value from `low` to `limit` that reaches the recall, or `limit`; recall rises with the value."""
    value = low
    while value < limit and measure(value) < required:
        low, value = value + 1, min(2 * value, limit)
    high = value
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(middle) >= required else (middle + 1, high)
    return high


def _advice(description: IndexDescription, config: IndexConfig, recall: float) -> str:
    """The error text for an index with too low a recall: its recall, and what to change."""
    kind, compressed = description.kind, config.storage != "float32"
    if kind == "ivf" and config.probes:
        advice, setting = "raise probes", f" with probes {description.probes}"
    elif kind == "ivf":
        advice, setting = "", f" with probes {description.probes}"
    elif kind == "hnsw":
        advice = "raise ef_search" if config.ef_search else "raise links or ef_construction"
        setting = f" with ef_search {description.ef_search}"
    else:
        advice, setting = "", ""
    if compressed or not advice:
        advice = ", or ".join(filter(None, (advice, "keep float32")))
    return (
        f"the {kind} index in {config.storage} finds {recall:.4f} of the exact {RECALL_AT} nearest{setting}, "
        f"and {config.recall:g} is required: {advice}, or require less; nothing was written"
    )
