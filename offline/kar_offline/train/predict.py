"""Owns predictions of a trained model: knowledge vectors of all entities, and log-odds of all rows of a split."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from kar_offline.models import CTRModel
from kar_offline.train.batches import Batches
from kar_offline.train.knowledge_inputs import KnowledgeInputs

__all__ = ["knowledge_vectors", "predict_logits"]

PREDICTION_ROWS: Final = 2048
"""Rows that are scored at once."""
ADAPTED_ROWS: Final = 2**16
"""Entities that pass through the adaptor at once."""


@torch.no_grad()
def knowledge_vectors(model: CTRModel, knowledge_inputs: KnowledgeInputs) -> dict[str, Tensor]:
    """The vectors that serving stores: the adaptor's output [entities, out] for every entity, by tower."""
    if model.adaptor is None:
        return {}
    device = next(model.parameters()).device
    tables: dict[str, Tensor] = {}
    for tower in model.adaptor.towers:
        vectors, present = knowledge_inputs.encodings(tower)
        parts = zip(vectors.split(ADAPTED_ROWS), present.split(ADAPTED_ROWS), strict=True)
        tables[tower] = torch.cat([model.adaptor.adapt({tower: (v.to(device), p.to(device))})[tower] for v, p in parts])
    return tables


@torch.no_grad()
def predict_logits(model: CTRModel, batches: Batches, tables: Mapping[str, Tensor] | None = None) -> Tensor:
    """Log-odds [S] of all rows, with the model in evaluation mode.

    Args:
        model: A trained model; it stays in evaluation mode.
        batches: The rows.
        tables: Knowledge vectors of all entities by tower; None computes them with `knowledge_vectors`.
    """
    model.eval()
    device = next(model.parameters()).device
    length = batches.samples.list_length
    entities = {"user": batches.samples.user, "item": batches.samples.item}
    tables = knowledge_vectors(model, batches.knowledge_inputs) if tables is None else tables
    logits = []
    for rows in batches.in_order(PREDICTION_ROWS):
        entity_rows = {
            tower: entities[tower][rows[::length] if tower == "user" else rows].to(device) for tower in tables
        }
        knowledge = {f"{tower}_knowledge": table[entity_rows[tower]] for tower, table in tables.items()}
        inputs = {name: tensor.to(device) for name, tensor in batches.inputs(rows).items()}
        logits.append(model({**inputs, **knowledge}).cpu())
    return torch.cat(logits) if logits else torch.zeros(0)
