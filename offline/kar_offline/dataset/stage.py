"""Owns the stage `dataset`: samples of any source in, WORK/dataset and a report of its splits out."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.splits import FOLDS, SEED, SPLITS
from kar_offline.stage_runner import RECORD, StageResult, run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError

__all__ = ["Split", "extend_dataset", "write_dataset"]

VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Split:
    """How events are split: users by seeded hash, one fold of them for test, or all by one clock."""

    by: Literal["user", "time"] = "user"
    fold: int = 0
    folds: int = FOLDS
    seed: int = SEED

    def of(self, dataset: Dataset) -> Dataset:
        """The dataset, split so; errors as of `Dataset.split_by_user` and `Dataset.split_by_time`."""
        return dataset.split_by_time() if self.by == "time" else dataset.split_by_user(self.fold, self.folds, self.seed)


def write_dataset(
    work: WorkFolder,
    make: Callable[[], tuple[Dataset, Mapping[str, Any]]],
    *,
    split: Split,
    history_length: int,
    params: Mapping[str, Any],
) -> StageResult:
    """Write `work`/dataset, unless the same parameters made it before.

    Args:
        work: The work folder.
        make: Gives the dataset and what its report tells about the source.
        split: How to split it.
        history_length: The number of events before a target that models read.
        params: What the dataset depends on beside `split` and `history_length`: hashes of files, options.

    Raises:
        InputError: a history shorter than 1, or what `make` and `split` raise.
    """
    if history_length < 1:
        raise InputError(f"a history of {history_length} events is empty: give --history-length at least 1")

    def build(folder: Path) -> dict[str, Any]:
        made, about = make()
        dataset = split.of(made)
        dataset.save(folder)
        return {**about, **_report(dataset)}

    chosen = {"split": asdict(split), "history_length": history_length, **params}
    return run_stage("dataset", work.dataset, build, inputs={}, params=chosen, version=VERSION)


def extend_dataset(work: WorkFolder, dataset: Dataset) -> StageResult:
    """Write a dataset that `work`/dataset has grown into, split as that was; does nothing when it is there already."""
    folder = work.dataset
    known = json.loads((folder / RECORD).read_text()) if (folder / RECORD).is_file() else {}
    params = known.get("source", {}).get("params", {})
    grown = Split(**params["split"]).of(dataset) if "split" in params else dataset.split_by_user()
    source = known.get("report", {}).get("source", "unknown")

    def build(draft: Path) -> dict[str, Any]:
        grown.save(draft)
        return {"source": source, **_report(grown)}

    refreshed = {**params, "refreshed": _content(grown)}
    return run_stage("dataset", folder, build, inputs={}, params=refreshed, version=VERSION)


def _content(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for entity in (*dataset.users, *dataset.items):
        digest.update(json.dumps(asdict(entity)).encode() + b"\n")
    for array in (dataset.offsets, dataset.event_item, dataset.event_rating, dataset.event_time, dataset.cutoff):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _report(dataset: Dataset) -> dict[str, Any]:
    samples = [dataset.samples(number) for number in range(len(SPLITS))]
    return {
        "name": dataset.name,
        "split": dataset.split,
        "users": len(dataset.users),
        "items": len(dataset.items),
        "events": len(dataset.event_item),
        "samples": len(dataset.sample_events),
        "positive_ratio": float(dataset.labels[dataset.sample_events].mean()) if sum(map(len, samples)) else 0.0,
        "splits": {
            name: {"users": len(np.unique(dataset.event_user[events])), "samples": len(events)}
            for name, events in zip(SPLITS, samples, strict=True)
        },
    }
