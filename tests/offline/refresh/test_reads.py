"""A refresh reads no file of the work folder twice."""

import re
from pathlib import Path

import pytest
from tests.support.file_reads import count_reads
from tests.support.refreshable import NOON_S, make_work, model, published, refreshed, write_lines

from kar_offline.work_folder import WorkFolder

pytestmark = pytest.mark.service

NEW_FILM = {"entity": "item", "id": "i8", "title": "Salt and Lanterns", "features": {}, "facts": {"genres": ["Drama"]}}
NEW_EVENT = {"user": "u0", "item": "i8", "rating": 5.0, "time": NOON_S}
READ_AGAIN = (
    # Each stage reads its record and those of its inputs, which are small, to see whether it is up to date.
    "work/(dataset|prompts|knowledge|encoding)/stage\\.json",
    # The files of a release are hashed before they are used.
    "work/releases/{release_id}/.*",
    # The index reads its pointer again before it replaces it.
    "work/index/.*/current",
)


def test_no_file_is_read_twice(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "work")
    release_id = make_work(work)
    store = published(work, release_id)
    files = {
        "events": write_lines(tmp_path / "events.jsonl", [NEW_EVENT]),
        "entities": write_lines(tmp_path / "entities.jsonl", [NEW_FILM]),
    }
    with count_reads(tmp_path) as reads:
        report = refreshed(WorkFolder(work.root), model(), store, release_id, **files)
    assert report["texts"]["written"] == 5
    assert {"events.jsonl", "entities.jsonl", "work/dataset/events.npz", "work/knowledge/item.jsonl"} <= set(reads)
    assert {"work/encoding/knowledge_item.npy", "work/prompts/scenario.json"} <= set(reads)
    allowed = "|".join(READ_AGAIN).replace("{release_id}", release_id)
    assert [name for name, number in reads.items() if number > 1 and not re.fullmatch(allowed, name)] == []
    assert max(number for name, number in reads.items() if name.startswith("work/releases/")) == 2
