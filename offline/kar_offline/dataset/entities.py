"""Owns the entities of a dataset: users and items with their features and facts, and their files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["Entity", "EntityTables", "load_entities", "save_entities"]

ENTITY_FILES: Final[Mapping[EntityKind, str]] = {USER: "users.jsonl", ITEM: "items.jsonl"}
"""One entity per line, in row order."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A user or an item."""

    id: str
    features: dict[str, Any]
    """Values that models read, by the names of the feature schema."""
    facts: dict[str, Any]
    """Values that prompts may show."""


EntityTables = Mapping[EntityKind, Sequence[Entity]]
"""The users and the items of a dataset; an entity's place in its table is its row number everywhere."""


def save_entities(folder: Path, tables: EntityTables) -> None:
    """Write one JSON-lines file per kind of entity."""
    for kind, file in ENTITY_FILES.items():
        (folder / file).write_text("".join(json.dumps(asdict(entity)) + "\n" for entity in tables[kind]))


def load_entities(folder: Path) -> dict[EntityKind, list[Entity]]:
    """Read the files of `save_entities`; raises OSError, ValueError or TypeError where one is missing or corrupt."""
    return {kind: _read(folder / file) for kind, file in ENTITY_FILES.items()}


def _read(file: Path) -> list[Entity]:
    lines: Iterable[str] = file.read_text().splitlines()
    return [Entity(**json.loads(line)) for line in lines]
