import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kar.records.v1 import records_pb2
from kar_offline.generate import Pack
from kar_offline.prompts import Prompt
from kar_sidecar.errors import IntegrityError, NotFoundError

pytestmark = pytest.mark.unit

HEADER = """
llm = "A model"
created_at = 2026-11-01T00:00:00Z
[templates]
item = "factual/1"
user = "reasoning/1"
"""
STORY = Prompt("1", "factual", "item", "factual/1", "Introduce it.", "ab12", 0, "Story")
ANN = Prompt("7", "reasoning", "user", "reasoning/1", "Analyse her.", "cd34", 2, "age: 24")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pack.toml").write_text(HEADER)
    (tmp_path / "item.jsonl").write_text('{"id": "1", "confidence": "low", "text": " A comedy. "}\n')
    (tmp_path / "user.jsonl").write_text('{"id": "7", "cutoff": 2, "text": "Likes drama."}\n')
    return tmp_path


def test_records_answer_the_prompts_in_their_order_with_provenance(folder: Path) -> None:
    ann, story = Pack.load(str(folder)).records([ANN, STORY])
    assert (ann.id, ann.entity, ann.text) == ("7", records_pb2.ENTITY_KIND_USER, "Likes drama.")
    assert (ann.template, ann.prompt_sha256, ann.llm, ann.history_cutoff) == ("reasoning/1", "unknown", "A model", 2)
    assert ann.created_at.ToDatetime(UTC) == datetime(2026, 11, 1, tzinfo=UTC)
    assert (story.id, story.entity, story.text) == ("1", records_pb2.ENTITY_KIND_ITEM, "A comedy.")
    assert (story.template, story.history_cutoff, story.confidence) == ("factual/1", 0, "low")
    assert ann.confidence == ""


def test_a_text_may_hold_any_character(folder: Path) -> None:
    (folder / "item.jsonl").write_text('{"id": "1", "text": "Amélie again"}\n\n', encoding="utf-8")
    assert Pack.load(str(folder)).records([STORY])[0].text == "Amélie again"


def test_entities_that_the_pack_does_not_know_are_left_out(folder: Path) -> None:
    other = Prompt("8", "reasoning", "user", "reasoning/1", "Analyse him.", "ef56", 5, "age: 30")
    assert [record.id for record in Pack.load(str(folder)).records([other, STORY])] == ["1"]


@pytest.mark.parametrize("cutoff", [1, 3])
def test_a_text_from_another_history_is_refused_as_leakage(folder: Path, cutoff: int) -> None:
    ann = Prompt("7", "reasoning", "user", "reasoning/1", "Analyse her.", "cd34", cutoff, "age: 24")
    with pytest.raises(IntegrityError, match=rf"user '7' from the first 2 .* shows {cutoff} \(leakage\)"):
        Pack.load(str(folder)).records([ann])


def test_an_unknown_name_lists_the_packs_there_are() -> None:
    with pytest.raises(NotFoundError, match=r"no pack 'ml-99k' \(known: ml-100k\)"):
        Pack.load("ml-99k")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("user.jsonl", '{"id": "7"}\n', "user.jsonl:1 is not a line of a pack"),
        ("item.jsonl", '{"id": "1", "text": "a"}\n' * 2, "item.jsonl:2 is about item '1' for the second time"),
        ("pack.toml", "llm = 3", "pack.toml does not describe a pack"),
        ("item.jsonl", None, "item.jsonl cannot be read"),
    ],
)
def test_a_broken_pack_names_the_place(folder: Path, file: str, content: str | None, words: str) -> None:
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(IntegrityError, match=words):
        Pack.load(str(folder))


def test_the_content_hash_follows_the_content(folder: Path) -> None:
    before = Pack.load(str(folder)).sha256
    assert Pack.load(str(folder)).sha256 == before
    (folder / "item.jsonl").write_text(json.dumps({"id": "1", "text": "A drama."}) + "\n")
    assert Pack.load(str(folder)).sha256 != before


def test_the_released_pack_is_whole() -> None:
    pack = Pack.load("ml-100k")
    assert {kind: sum(1 for k, _ in pack.lines if k == kind) for kind in ("item", "user")} == {
        "item": 1682,
        "user": 943,
    }
    assert all(line.text for line in pack.lines.values())
    assert all((1 <= line.cutoff <= 30) == (kind == "user") for (kind, _), line in pack.lines.items())
