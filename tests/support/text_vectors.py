"""Owns a builder: the folder of an encoding stage, with random vectors for a dataset."""

import json
from pathlib import Path

import numpy as np

from kar_offline.dataset.dataset import Dataset

__all__ = ["write_text_vectors"]


def write_text_vectors(
    folder: Path,
    dataset: Dataset,
    *,
    dim: int,
    generator: np.random.Generator,
    without: int | None = None,
    encoder_id: str = "e",
) -> None:
    """Write raw and knowledge vectors of all users and items; the entities in row `without` have no text."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in ("knowledge", "raw"):
        for kind, entities in dataset.entities.items():
            vectors = generator.normal(size=(len(entities), dim)).astype(np.float32)
            hashes: list[str | None] = [f"{source}{row}" for row in range(len(entities))]
            if without is not None:
                vectors[without] = 0
                hashes[without] = None
            np.save(folder / f"{source}_{kind}.npy", vectors)
            ids = [entity.id for entity in entities]
            header = {"encoder_id": encoder_id, "dim": dim, "ids": ids, "text_sha256": hashes}
            (folder / f"{source}_{kind}.json").write_text(json.dumps(header))
