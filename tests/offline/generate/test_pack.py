import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.support import asking
from tests.support.asking import Notes

from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Answer, Failure, Origin, Question, Reply
from kar_sidecar.errors import IntegrityError, NotFoundError

pytestmark = pytest.mark.unit

HEADER = """
llm = "A model"
created_at = 2026-11-01T00:00:00Z
[templates]
item = "factual/1"
user = "reasoning/1"
"""
STORY = Question("item", "1", "Introduce it.", "ab12")
ANN = Question("user", "7", "Analyse her.", "cd34", 2)


def ask(pack: Pack, *questions: Question) -> list[Answer]:
    return asking.ask(pack, questions, Notes(refuse=never))


def never(questions: int) -> None:
    raise AssertionError("a pack sends nothing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pack.toml").write_text(HEADER)
    (tmp_path / "item.jsonl").write_text('{"id": "1", "confidence": "low", "text": " A comedy. "}\n')
    (tmp_path / "user.jsonl").write_text('{"id": "7", "cutoff": 2, "text": "Likes drama."}\n')
    return tmp_path


def test_texts_answer_the_questions_in_their_order_and_cost_nothing(folder: Path) -> None:
    written_at = datetime(2026, 11, 1, tzinfo=UTC)
    pack = Pack.load(str(folder))
    assert ask(pack, ANN, STORY) == [
        Answer(ANN, Reply("Likes drama.", 0, 0, requests=0, origin=Origin("A model", "reasoning/1", written_at, ""))),
        Answer(STORY, Reply("A comedy.", 0, 0, requests=0, origin=Origin("A model", "factual/1", written_at, "low"))),
    ]
    assert pack.cost_usd(10, 10) == pack.worst_usd(ANN) == 0


def test_a_pack_says_what_it_is(folder: Path) -> None:
    pack = Pack.load(str(folder))
    assert (pack.provider, pack.model, pack.parameters, pack.concurrency) == ("pack", folder.name, {}, 1)
    assert pack.provenance == f"A model sha256:{pack.sha256[:12]}"


def test_a_pack_without_a_header_is_of_unknown_origin(folder: Path) -> None:
    (folder / "pack.toml").unlink()
    ((_, reply),) = ask(Pack.load(str(folder)), STORY)
    assert isinstance(reply, Reply)
    assert reply.origin == Origin("unknown", "unknown", None, "low")


def test_a_text_may_hold_any_character(folder: Path) -> None:
    (folder / "item.jsonl").write_text('{"id": "1", "text": "Amélie\u2028again"}\n\n', encoding="utf-8")
    ((_, reply),) = ask(Pack.load(str(folder)), STORY)
    assert isinstance(reply, Reply)
    assert reply.text == "Amélie\u2028again"


def test_entities_that_the_pack_does_not_know_fail(folder: Path) -> None:
    (folder / "item.jsonl").write_text('{"id": "1", "text": " "}\n')
    other = ANN._replace(id="8", history_cutoff=5)
    unknown = Failure("the pack does not know it", requests=0)
    assert [outcome for _, outcome in ask(Pack.load(str(folder)), other, STORY)] == [unknown, unknown]


@pytest.mark.parametrize("cutoff", [1, 3])
def test_a_text_from_another_history_is_refused_as_leakage_before_any_is_given(folder: Path, cutoff: int) -> None:
    found: list[Answer] = []

    async def main() -> None:
        async for answer in Pack.load(str(folder)).ask([STORY, ANN._replace(history_cutoff=cutoff)], Notes()):
            found.append(answer)

    with pytest.raises(IntegrityError, match=rf"user '7' from the first 2 .* shows {cutoff} \(leakage\)"):
        asyncio.run(main())
    assert found == []


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
