"""Owns the checkpoint of a publish: how many records of each part are written, kept in the store itself.

A publish that is started again after a kill reads the checkpoint and skips the records that are written.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kar_sidecar.store import Store

__all__ = ["Checkpoint", "publish_meta"]


def publish_meta(release_id: str) -> str:
    """Name of the store's meta value that holds the checkpoint of a release; absent when no publish is under way."""
    return f"publish:{release_id}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Numbers of written records by the name of their part."""

    store: Store
    release_id: str
    identity: Mapping[str, Any]
    """Identifies the content that is published; a checkpoint with another identity is ignored."""
    rows: dict[str, int]

    @staticmethod
    def read(store: Store, release_id: str, identity: Mapping[str, Any]) -> "Checkpoint":
        """Read the checkpoint of a killed publish; an empty one if there is none with this identity."""
        stored = json.loads(store.read_meta(publish_meta(release_id)) or b"{}")
        return Checkpoint(store, release_id, identity, stored["rows"] if stored.get("of") == identity else {})

    def save(self, part_name: str, rows: int) -> None:
        """Note that the first `rows` records of a part are written."""
        self.rows[part_name] = rows
        value = {"of": self.identity, "rows": self.rows}
        self.store.write_meta(publish_meta(self.release_id), json.dumps(value).encode())
