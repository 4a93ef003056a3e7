"""Owns the sharing of a run's calls among entities: content vectors, prompts about clusters, neighbours."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.encoders.text_encoder import TextEncoder
from kar_offline.generate.collective import event_counts, plan_calls
from kar_offline.prompts import Prompt, Renderer, read_renderer
from kar_offline.stage_runner import run_stage
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["Shared", "Sharing", "share_calls"]


@dataclass(frozen=True, slots=True)
class Sharing:
    """The share of calls to make, and the encoder that compares entities."""

    share: float
    """Number of calls divided by number of entities, above 0 and at most 1."""
    encoder: TextEncoder
    """Encodes the facts that prompts show."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The prompts that are asked instead of one for each entity."""

    own: Sequence[Prompt]
    """Prompts about single entities."""
    clusters: Sequence[Prompt]
    """Prompts about clusters of entities."""
    neighbours: Mapping[tuple[EntityKind, str], Sequence[records_pb2.Loan]]
    """Neighbours of an entity by its kind and id; they are used if the entity has no text in use."""


def share_calls(work: WorkFolder, prompts: Sequence[Prompt], sharing: Sharing, on: date) -> Shared:
    """Choose which of `prompts` to ask, and which entities to combine into prompts about clusters.

    Args:
        work: The work folder; content vectors are kept in `work`/content.
        prompts: Prompts about single entities.
        sharing: The share of calls, and the encoder.
        on: Prompts about clusters mention the seasons of this day.

    Raises:
        InputError: the share is out of range.
    """
    vectors = _content(work, prompts, sharing.encoder)
    renderer, dataset = read_renderer(work.prompts, on), work.read(Dataset)
    events = event_counts(dataset)
    own: list[Prompt] = []
    clusters: list[Prompt] = []
    neighbours: dict[tuple[EntityKind, str], Sequence[records_pb2.Loan]] = {}
    for kind in EntityKind:
        of_kind = [prompt for prompt in prompts if prompt.entity == kind]
        if not of_kind:
            continue
        row_of = {entity.id: row for row, entity in enumerate(dataset.entities[kind])}
        ids = [prompt.id for prompt in of_kind]
        rows = [row_of[id_] for id_ in ids]
        plan = plan_calls(
            ids,
            [prompt.raw_text for prompt in of_kind],
            vectors[kind],
            sharing.share,
            counts=events[kind][rows],
            threads=len(os.sched_getaffinity(0)),
        )
        own += [of_kind[number] for number in plan.own.tolist()]
        for cluster_id, members in plan.clusters.items():
            clusters.append(_about_cluster(renderer, dataset, kind, cluster_id, [rows[number] for number in members]))
        neighbours |= {(kind, id_): plan.neighbour_weights(number) for number, id_ in enumerate(ids)}
    return Shared(own, clusters, neighbours)


def _about_cluster(
    renderer: Renderer, dataset: Dataset, kind: EntityKind, cluster_id: str, rows: Sequence[int]
) -> Prompt:
    if kind == ITEM:
        return renderer.cluster(ITEM, cluster_id, [dataset.items[row] for row in rows])
    histories = []
    for row in rows:
        events = dataset.prompt_events(row)
        items = [dataset.items[item] for item in dataset.event_item[events]]
        histories.append(list(zip(items, dataset.event_rating[events].tolist(), strict=True)))
    return renderer.cluster(USER, cluster_id, [dataset.users[row] for row in rows], histories)


def _content(work: WorkFolder, prompts: Sequence[Prompt], encoder: TextEncoder) -> dict[str, NDArray[np.float32]]:
    """Content vectors [prompts of the kind, D] by kind, in the order of `prompts`."""
    texts = {kind: [prompt.raw_text for prompt in prompts if prompt.entity == kind] for kind in EntityKind}

    def build(folder: Path) -> dict[str, Any]:
        for kind, of_kind in texts.items():
            vectors = encoder.encode(of_kind) if of_kind else np.zeros((0, encoder.dim), np.float32)
            np.save(folder / f"{kind}.npy", vectors)
        return {kind: len(of_kind) for kind, of_kind in texts.items()}

    params = {"encoder_id": encoder.encoder_id, "prompts": [prompt.prompt_sha256 for prompt in prompts]}
    folder = run_stage("content", work.content, build, inputs={}, params=params, version=1).folder
    return {kind: np.load(folder / f"{kind}.npy") for kind in EntityKind}
