"""Owns small logs of events on days, and work folders with all stages of such a log up to the vectors."""

import numpy as np
from numpy.typing import ArrayLike

from kar.records.v1 import records_pb2
from kar_bench.studies.freshness.simulation import DAY_S
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.encode import encode
from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.knowledge.records import write_knowledge
from kar_offline.prompts import render_prompts
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER

GENRES = ("War", "Drama", "Comedy")


def event_log(
    user: ArrayLike, item: ArrayLike, rating: ArrayLike, day: ArrayLike, *, users: int = 0, items: int = 0
) -> Dataset:
    """A dataset of events at noon of days, seconds apart in the order given; item 3 is "Film 3", a film of `GENRES`."""
    user, item = np.array(user), np.array(item)
    return Dataset.from_events(
        "log",
        records_pb2.FeatureSchema(
            history_length=4,
            features=[records_pb2.Feature(name="age", entity=USER.number, type=records_pb2.FEATURE_TYPE_NUMERIC)],
        ),
        [Entity(f"u{row}", {"age": row}, {}) for row in range(users or user.max() + 1)],
        [
            Entity(f"i{row:02}", {}, {"title": f"Film {row}", "genres": [GENRES[row % 3]]})
            for row in range(items or item.max() + 1)
        ],
        user=user,
        item=item,
        rating=np.array(rating, np.float32),
        time=np.array(day) * DAY_S + DAY_S // 2 + np.arange(len(user)),
        positive_above=3,
    )


def random_event_log(events: int = 600, days: int = 10, seed: int = 0) -> Dataset:
    """Events of 15 users and 20 items."""
    rng = np.random.default_rng(seed)
    user, day = rng.integers(0, 15, events), np.sort(rng.integers(0, days, events))
    return event_log(user, rng.integers(0, 20, events), rng.integers(1, 6, events), day, users=15, items=20)


def write_stages(work: WorkFolder, dataset: Dataset, refused: tuple[str, ...] = ()) -> WorkFolder:
    """Write all stages up to the vectors, with texts about all entities but `refused`; return the work folder."""
    work.dataset.mkdir(parents=True)
    dataset.save(work.dataset)
    render_prompts(work)
    work.knowledge.mkdir()
    write_knowledge(
        work.knowledge,
        [
            records_pb2.KnowledgeRecord(
                id=entity.id, entity=kind.number, text=f"A text about {entity.id}, {GENRES[row % 3]}"
            )
            for kind, entities in ((ITEM, dataset.items), (USER, dataset.users))
            for row, entity in enumerate(entities)
            if entity.id not in refused
        ],
    )
    encode(work, HashingEncoder())
    return work
