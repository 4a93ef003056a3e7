"""Owns publishing fresh features from a file: all lines are checked, then each is written unless the store is newer.

One JSON object per entity, which replaces its features and history in the store:
{"entity": "user", "id": "42", "features": {"age": 24}, "history": [["item id", 4.0]], "as_of": "2026-11-01T12:00:00Z"}
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    field_validator,
    model_validator,
)
from rich.progress import Progress

from kar_offline.jsonl import each_line
from kar_offline.publish.released_entities import EntityRecords
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, EntityKind
from kar_sidecar.errors import InputError, PreconditionError
from kar_sidecar.features import History
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import FEATURES, EntityKey, schema_meta
from kar_sidecar.store.cluster import AerospikeSettings
from kar_sidecar.store.open import open_store

__all__ = ["FeatureUpdateReport", "FreshEntity", "publish_features", "read_features"]

CLOCK_TOLERANCE: Final = timedelta(days=1)
"""`as_of` may be this far in the future, since clocks differ."""
Id = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class FeatureUpdateReport:
    """Counts of the records of a features file that were written and kept."""

    release_id: str
    store: str
    file: str
    records: int
    """Lines of the file."""
    written: int
    kept: int
    """Records that stayed as they were, since the store held newer ones."""
    seconds: float


class FreshEntity(BaseModel):
    """One line of a features file. A feature that the line leaves out becomes a missing value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    entity: EntityKind
    id: Id
    features: dict[str, Any] = Field(default_factory=dict)
    history: list[tuple[Id, FiniteFloat]] = Field(default_factory=list)
    """Users only: item id and rating of each event, the oldest first."""
    as_of: AwareDatetime
    """The time at which these values were valid; an older record never replaces a newer one."""

    @field_validator("as_of")
    @classmethod
    def _not_in_the_future(cls, as_of: datetime) -> datetime:
        if as_of > datetime.now(UTC) + CLOCK_TOLERANCE:
            raise ValueError("lies in the future, and would keep out every update until then")
        return as_of

    @model_validator(mode="after")
    def _items_have_no_history(self) -> "FreshEntity":
        if self.entity == ITEM and self.history:
            raise ValueError("items have no history")
        return self


def read_features(path: Path, release: Release) -> EntityRecords:
    """Read the feature records of a file, packed by the schema of a release.

    Raises:
        InputError: a line is wrong; the message has its number.
    """
    yield from each_line(path, FreshEntity, lambda line: _feature_record(line, release), "nothing was written")


def _feature_record(fresh: FreshEntity, release: Release) -> tuple[EntityKey, bytes]:
    written_at_ms = round(fresh.as_of.timestamp() * 1000)
    key = EntityKey(fresh.entity, fresh.id)
    if key.kind == ITEM:
        layout = release.item_layout
        return key, layout.encode(layout.row(fresh.features), written_at_ms=written_at_ms)
    ratings = np.array([rating for _, rating in fresh.history], dtype=np.float32)
    history = History(tuple(item for item, _ in fresh.history), ratings)
    layout = release.user_layout
    return key, layout.encode(layout.row(fresh.features), written_at_ms=written_at_ms, history=history)


def publish_features(
    work: WorkFolder,
    release_id: str,
    store_url: str,
    file: Path,
    *,
    aerospike: AerospikeSettings | None = None,
    progress: Progress | None = None,
) -> FeatureUpdateReport:
    """Write the features of a file into the store of a published release; vectors and texts stay as they are.

    The file is read twice, so that a wrong line is found before anything is written.

    Args:
        work: The work folder.
        release_id: The release whose schema packs the features.
        store_url: The store, as `--store` names it.
        file: The file.
        aerospike: Settings of an Aerospike store.
        progress: Shows progress; None: no progress is shown.

    Raises:
        InputError: the file cannot be read, or a line is wrong; the message has its number.
        NotFoundError: no such release.
        PreconditionError: features of this schema are not published in the store.
        UnavailableError: the store does not answer.
    """
    began = time.perf_counter()
    if not file.is_file():
        raise InputError(f"{file} is not a file: name one with a JSON object a line")
    release = Release.load(work.releases, release_id)
    progress = progress or Progress(disable=True)
    records = sum(1 for _ in progress.track(read_features(file, release), description="checking"))
    store = open_store(store_url, aerospike=aerospike)
    try:
        if store.read_meta(schema_meta(release.manifest.feature_schema_hash)) is None:
            raise PreconditionError(f"release {release_id} is not in {store_url}: run `kar publish` without --features")
        stream = progress.track(read_features(file, release), records, description="features")
        written = store.write(FEATURES, stream, newer_only=True)
    finally:
        store.close()
    seconds = time.perf_counter() - began
    return FeatureUpdateReport(release_id, store_url, str(file), records, written, records - written, seconds)
