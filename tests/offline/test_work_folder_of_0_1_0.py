"""Work folders, releases and stores that the code of 0.1.0 wrote are still read, and nothing is made again."""

import tarfile
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tests.support.paths import DATA
from tests.support.refreshable import LATER, NOON_S, at, model, write_lines

from kar_offline.dataset.dataset import Dataset
from kar_offline.encode import encode
from kar_offline.encode.vector_files import Encoding
from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.export import export
from kar_offline.inspection.freshness import text_status
from kar_offline.knowledge.knowledge_folder import Knowledge
from kar_offline.prompts import RenderedPrompts
from kar_offline.publish import publish
from kar_offline.refresh.plan import Budget
from kar_offline.refresh.policy import Policy
from kar_offline.refresh.report import ArrivalCounts
from kar_offline.refresh.stage import refresh
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM, USER
from kar_sidecar.index.faiss import FaissIndex
from kar_sidecar.index.snapshot import read_current
from kar_sidecar.releases.manifest import Release, read_active
from kar_sidecar.store import EntityKey, vector_part
from kar_sidecar.store.open import open_store
from kar_sidecar.store.records import FULL, decode_vectors

pytestmark = pytest.mark.service

RELEASE_ID = "227bbd50f305"


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    with tarfile.open(DATA / "work_folder_0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return WorkFolder(tmp_path / "work")


def test_every_stage_can_be_read(work: WorkFolder) -> None:
    dataset, knowledge, encoding = work.read(Dataset), work.read(Knowledge), work.read(Encoding)
    assert (len(dataset.users), len(dataset.items), len(dataset.event_item)) == (4, 8, 24)
    assert [prompt.id for prompt in work.read(RenderedPrompts).prompts] == [
        *(f"i{row}" for row in range(8)),
        *(f"u{row}" for row in range(4)),
    ]
    texts = [record.text for record in knowledge.records[ITEM].values()]
    np.testing.assert_array_equal(encoding.vectors("knowledge_item"), HashingEncoder().encode(texts))
    status = text_status(work, Policy(2), LATER)
    assert (status[ITEM].own_text, status[USER].own_text) == (8, 4)


def test_stages_are_up_to_date(work: WorkFolder) -> None:
    assert not encode(work, HashingEncoder()).ran
    assert export(work, "dcnv2").report.release_id == RELEASE_ID == read_active(work.releases)


def test_its_release_is_published_in_its_store(work: WorkFolder) -> None:
    release = Release.load(work.releases, RELEASE_ID)
    result = publish(work, RELEASE_ID, f"lmdb:{work.store}")
    assert not result.ran
    assert (result.report.users, result.report.items, result.report.written) == (4, 8, {})
    space = release.manifest.adapted_space
    with closing(open_store(f"lmdb:{work.store}", readonly=True)) as store:
        blobs = [blob for (blob,) in store.read([EntityKey(ITEM, "i0")], [vector_part(space.space_id)])]
    batch = decode_vectors(blobs, space.space_id, space.dim, release.neutral[1], dtype=space.dtype, at_ms=0)
    assert batch.levels.tolist() == [FULL]
    np.testing.assert_array_equal(batch.vectors[0], np.load(release.folder / "vectors" / "item_adapted.npy")[0])
    current = read_current(work.index / RELEASE_ID / "item")
    assert current is not None
    with closing(FaissIndex.load(work.index / RELEASE_ID / "item" / current.snapshot_id)) as index:
        assert index.search(np.load(release.folder / "vectors" / "item_encoded.npy")[:1], 1).ids == [["i0"]]


def test_it_can_be_refreshed(work: WorkFolder) -> None:
    event = {"user": "u0", "item": "i7", "rating": 5.0, "time": NOON_S}
    events = write_lines(work.root.parent / "events.jsonl", [event])
    report = refresh(
        work,
        model(),
        HashingEncoder,
        release_id=RELEASE_ID,
        open_store=partial(open_store, f"lmdb:{work.store}"),
        events=events,
        policy=Policy(2),
        budget=Budget(),
        now=at(LATER),
    )
    assert report.arrived == ArrivalCounts(users=0, items=0, events=1)
    assert report.texts is not None
    assert report.texts.written == 4
    assert report.written is not None
    assert report.written["encoded"] == 4
