"""Owns how a run shares calls: content vectors, the prompts about clusters, and who borrows from whom."""

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
from kar_offline.generate.collective import event_counts, plan
from kar_offline.prompts import Prompt, Renderer, read_renderer
from kar_offline.stage_runner import run_stage
from kar_sidecar.entities import ITEM, USER, EntityKind

__all__ = ["Shared", "Sharing", "share_calls"]


@dataclass(frozen=True, slots=True)
class Sharing:
    """How many calls to make, and what tells which entities are alike."""

    share: float
    """Calls by entities, above 0 and at most 1."""
    encoder: TextEncoder
    """Of the facts that prompts show."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What is asked instead of one question an entity."""

    own: Sequence[Prompt]
    """About entities by themselves."""
    clusters: Sequence[Prompt]
    loans: Mapping[tuple[EntityKind, str], Sequence[records_pb2.Loan]]
    """By kind and id, what stands for an entity that has no text of its own, or whose text is refused."""


def share_calls(work: Path, prompts: Sequence[Prompt], sharing: Sharing, on: date) -> Shared:
    """Choose which of `prompts` to ask by themselves, and which entities to ask about as clusters.

    Args:
        work: The work folder; content vectors are kept in `work`/content.
        prompts: About entities, each by itself.
        sharing: How many to ask.
        on: The day whose seasons enter the prompts about clusters.

    Raises:
        InputError: the share is out of range.
    """
    vectors = _content(work, prompts, sharing.encoder)
    renderer, dataset = read_renderer(work / "prompts", on), Dataset.load(work / "dataset")
    rows = {
        kind: {e.id: row for row, e in enumerate(of)} for kind, of in ((ITEM, dataset.items), (USER, dataset.users))
    }
    events = event_counts(dataset)
    own: list[Prompt] = []
    clusters: list[Prompt] = []
    loans: dict[tuple[EntityKind, str], Sequence[records_pb2.Loan]] = {}
    for kind in EntityKind:
        asked = [prompt for prompt in prompts if prompt.entity == kind]
        if not asked:
            continue
        ids = [prompt.id for prompt in asked]
        made = plan(
            ids,
            [prompt.raw_text for prompt in asked],
            vectors[kind],
            sharing.share,
            counts=events[kind][[rows[kind][id_] for id_ in ids]],
            threads=len(os.sched_getaffinity(0)),
        )
        own += [asked[at] for at in made.own.tolist()]
        for cluster_id, members in made.clusters.items():
            clusters.append(
                _about_cluster(renderer, dataset, kind, cluster_id, [rows[kind][ids[at]] for at in members])
            )
        loans |= {(kind, id_): made.loans(at) for at, id_ in enumerate(ids)}
    return Shared(own, clusters, loans)


def _about_cluster(
    renderer: Renderer, dataset: Dataset, kind: EntityKind, cluster_id: str, members: Sequence[int]
) -> Prompt:
    if kind == ITEM:
        return renderer.cluster(ITEM, cluster_id, [dataset.items[row] for row in members])
    histories = []
    for row in members:
        events = dataset.prompt_events(row)
        items = [dataset.items[item] for item in dataset.event_item[events]]
        histories.append(list(zip(items, dataset.event_rating[events].tolist(), strict=True)))
    return renderer.cluster(USER, cluster_id, [dataset.users[row] for row in members], histories)


def _content(work: Path, prompts: Sequence[Prompt], encoder: TextEncoder) -> dict[str, NDArray[np.float32]]:
    """Content vectors by kind, row by row as in `prompts`."""
    texts = {kind: [prompt.raw_text for prompt in prompts if prompt.entity == kind] for kind in EntityKind}

    def build(folder: Path) -> dict[str, Any]:
        for kind, of in texts.items():
            np.save(folder / f"{kind}.npy", encoder.encode(of) if of else np.zeros((0, encoder.dim), np.float32))
        return {kind: len(of) for kind, of in texts.items()}

    params = {"encoder_id": encoder.encoder_id, "prompts": [prompt.prompt_sha256 for prompt in prompts]}
    folder = run_stage("content", work / "content", build, inputs={}, params=params, version=1).folder
    return {kind: np.load(folder / f"{kind}.npy") for kind in EntityKind}
