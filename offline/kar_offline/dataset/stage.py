"""Owns the stage `dataset`: data of any source in, WORK/dataset and a report of its splits out."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.report import DatasetReport
from kar_offline.dataset.source import DatasetSource
from kar_offline.dataset.splits import FOLDS, SEED
from kar_offline.stage_runner import RECORD, StageResult, run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError

__all__ = ["Split", "build_dataset", "extend_dataset"]

VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Split:
    """The options of a split: one fold of the users for test, or the latest events."""

    by: Literal["user", "time"] = "user"
    fold: int = 0
    """Fold of a split by user, from 0."""
    folds: int = FOLDS
    """Number of folds of a split by user."""
    seed: int = SEED
    """Seed of a split by user."""

    def apply(self, dataset: Dataset) -> Dataset:
        """The dataset with this split.

        Raises:
            InputError: there is no such fold.
            PreconditionError: the events cannot be split by time.
        """
        return dataset.split_by_time() if self.by == "time" else dataset.split_by_user(self.fold, self.folds, self.seed)


def build_dataset(
    work: WorkFolder, source: DatasetSource, *, split: Split | None = None, history_length: int = 30
) -> StageResult[DatasetReport]:
    """Write `work.dataset`, unless it is there already, made from the same source and options.

    Nothing is written if a check fails.


    Args:
        work: The work folder.
        source: The source of the data.
        split: How to split the events; None splits by user with default options.
        history_length: Maximal number of events in the history of a sample.

    Raises:
        InputError: a history is shorter than 1, or there is no such fold.
        PreconditionError: the events cannot be split by time.
        KarError: the source cannot be read.
    """
    if history_length < 1:
        raise InputError(f"a history of {history_length} events is empty: give --history-length at least 1")
    split = split or Split()

    def build(draft: Path) -> DatasetReport:
        sourced = source.read(history_length)
        dataset = split.apply(sourced.dataset)
        dataset.save(draft)
        return DatasetReport.of(dataset, sourced.source, sourced.skipped_sources)

    params = {"split": asdict(split), "history_length": history_length, **source.params}
    return run_stage(
        "dataset", work.dataset, build, inputs={}, params=params, version=VERSION, report_type=DatasetReport
    )


def extend_dataset(work: WorkFolder, dataset: Dataset) -> StageResult[DatasetReport]:
    """Replace the dataset of a work folder by a larger one, split with the same options as before.

    Does nothing if the folder holds this dataset already.
    """
    record_file = work.dataset / RECORD
    record = json.loads(record_file.read_text()) if record_file.is_file() else {}
    params = record.get("source", {}).get("params", {})
    extended = Split(**params["split"]).apply(dataset) if "split" in params else dataset.split_by_user()
    source = record.get("report", {}).get("source", "unknown")

    def build(draft: Path) -> DatasetReport:
        extended.save(draft)
        return DatasetReport.of(extended, source)

    params = {**params, "refreshed": _content_hash(extended)}
    result = run_stage(
        "dataset", work.dataset, build, inputs={}, params=params, version=VERSION, report_type=DatasetReport
    )
    if result.ran:
        work.keep(extended)
    return result


def _content_hash(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for entity in (*dataset.users, *dataset.items):
        digest.update(json.dumps(asdict(entity)).encode() + b"\n")
    for array in (dataset.offsets, dataset.event_item, dataset.event_rating, dataset.event_time, dataset.cutoff):
        digest.update(array.tobytes())
    return digest.hexdigest()
