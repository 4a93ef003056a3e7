"""Owns a work folder that can be refreshed: eight films, four viewers, made-up texts, a release, a full store."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tests.support.film_scenario import film_scenario
from tests.support.prose import prose

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.dataset.source import SourcedDataset
from kar_offline.dataset.stage import build_dataset as build_dataset_of
from kar_offline.encode import encode
from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.export import export
from kar_offline.generate import ScriptedModel, generate
from kar_offline.prompts import render_prompts
from kar_offline.publish.stage import publish_release
from kar_offline.refresh.plan import Budget
from kar_offline.refresh.policy import Policy
from kar_offline.refresh.stage import refresh
from kar_offline.train.checkpoint import build_model, run_folder, save_trained
from kar_offline.train.features import encode_dataset
from kar_offline.train.knowledge_inputs import AffinityInput
from kar_offline.train.principal_components import principal_components
from kar_offline.train.vectors import load_text_vectors
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.ranking.affinity import affinity_columns
from kar_sidecar.releases.manifest import Release
from kar_sidecar.store import Store
from kar_sidecar.store.memory import MemoryStore

__all__ = [
    "DAY_S",
    "LATER",
    "NOON",
    "NOON_S",
    "TITLES",
    "at",
    "build_dataset",
    "make_work",
    "model",
    "published",
    "refreshed",
    "write_lines",
]

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
NOON_S = int(NOON.timestamp())
LATER = NOON + timedelta(hours=1)
"""Time of the refreshes, after the release was made."""
DAY_S = 86_400
TITLES = (
    *("Amber Road", "Blue Harbour", "Crooked Mile", "Distant Bells"),
    *("Empty Quarter", "Falling Leaves", "Glass Orchard", "Hollow Moon"),
)
BACKBONE, WIDTH, KNOWLEDGE = "dcnv2", 2, 3
COLUMNS = affinity_columns(1)
SCENARIO = film_scenario(90)


def at(time: datetime) -> Callable[[], datetime]:
    return lambda: time


def model(**options: Any) -> ScriptedModel:
    """A model that writes about the first title in a prompt, a different text for every prompt."""
    return ScriptedModel(lambda prompt: prose(prompt.split('"')[1], prompt), **options)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _dataset() -> Dataset:
    """Each viewer rated six of eight films on the six days before noon; prompts may show three of them."""
    features = [
        records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC),
        records_pb2.Feature(name="genres", entity=ITEM.number, type=records_pb2.FEATURE_TYPE_CATEGORICAL, width=2),
    ]
    events = [(user, (user + step) % 8) for user in range(4) for step in range(6)]
    return Dataset.from_events(
        "films",
        records_pb2.FeatureSchema(features=features, history_length=3),
        [Entity(f"u{row}", {"age": 20 + row}, {"age": 20 + row}) for row in range(4)],
        [
            Entity(f"i{row}", {"genres": ["Drama"]}, {"title": title, "genres": ["Drama"]})
            for row, title in enumerate(TITLES)
        ],
        user=np.array([user for user, _ in events]),
        item=np.array([item for _, item in events]),
        rating=np.array([1 + (user + item) % 5 for user, item in events], np.float32),
        time=np.array([NOON_S - DAY_S * (6 - step) for _ in range(4) for step in range(6)]),
        positive_above=3,
    )


class _Films:
    """The source of the small dataset."""

    params: ClassVar[dict[str, str]] = {}

    def read(self, history_length: int) -> SourcedDataset:
        return SourcedDataset(_dataset(), "made")


def build_dataset(work: WorkFolder) -> None:
    """Write the dataset as it comes from its source, in place of the one that is there."""
    build_dataset_of(work, _Films(), history_length=3)


def _train(work: WorkFolder) -> None:
    """Two models with random weights; the knowledge model has the item tower and affinity of texts."""
    torch.manual_seed(1)
    dataset = work.read(Dataset)
    data = encode_dataset(dataset)
    texts = load_text_vectors(work.encoding, "knowledge", dataset)
    components = principal_components(texts.item, texts.item_present, WIDTH)
    affinity = AffinityInput((("text", WIDTH),), components, torch.zeros(COLUMNS), torch.ones(COLUMNS))
    adaptor = {"dim": texts.dim, "hidden": 5, "out": KNOWLEDGE, "shared": 1, "dedicated": 2, "towers": ("item",)}
    for arm, arguments in (("control", None), ("knowledge", adaptor)):
        sizes = {"item_knowledge": KNOWLEDGE, "affinity": COLUMNS} if arguments else {}
        spec = type(data.spec).from_json(data.spec.to_json() | sizes)
        weights = build_model(BACKBONE, spec, data.categories, arguments).state_dict()
        folder = run_folder(work, BACKBONE, arm)
        folder.mkdir(parents=True)
        identity = {"backbone": BACKBONE, "arm": arm, "spec": spec.to_json(), "adaptor": arguments}
        identity |= {"encoder_id": texts.encoder_id if arguments else "", "settings": {"seed": 0}}
        model_affinity = affinity if arguments else None
        save_trained(folder, weights, data.features, model_affinity, identity=identity, metrics={"validation_loss": 1})


def make_work(work: WorkFolder) -> str:
    """Everything up to a release; returns its id."""
    work.root.mkdir()
    (work.root.parent / "films.toml").write_text(SCENARIO)
    build_dataset(work)
    render_prompts(work, work.root.parent / "films.toml", NOON.date())
    generate(work, model(), now=at(NOON))
    encode(work, HashingEncoder())
    _train(work)
    return str(export(work, BACKBONE, now_s=NOON.timestamp).report.release_id)


def published(work: WorkFolder, release_id: str, store: Store | None = None) -> Store:
    """A store with the release; default: in memory."""
    store = store or MemoryStore()
    release = Release.load(work.releases, release_id)
    publish_release(release, work.read(Dataset), store, work.index / release_id)
    return store


def refreshed(work: WorkFolder, provider: Any, store: Store, release_id: str, **options: Any) -> dict[str, Any]:
    """One refresh; texts of users are due after two events unless told otherwise."""
    chosen = {"policy": Policy(2), "budget": Budget(), "now": at(LATER), **options}
    return refresh(work, provider, HashingEncoder, release_id=release_id, open_store=lambda: store, **chosen).as_json()
