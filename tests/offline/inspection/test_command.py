"""`kar knowledge`: what it prints about an entity, and about money."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from tests.support.prose import prose
from typer.testing import CliRunner, Result

from kar.records.v1 import records_pb2
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.encode import encode
from kar_offline.encoders.hashing import HashingEncoder
from kar_offline.generate import ScriptedModel, generate
from kar_offline.inspection.command import knowledge
from kar_offline.prompts import render_prompts
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError, NotFoundError, PreconditionError

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
TITLES = ("Amber Road", "Blue Harbour", "Crooked Mile")


def answer(prompt: str) -> str:
    title = next(title for title in TITLES if f'"{title}"' in prompt)
    return "I cannot help with that." if title == "Crooked Mile" else prose(title, prompt)


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    (tmp_path / "dataset").mkdir()
    Dataset.from_events(
        "made",
        records_pb2.FeatureSchema(history_length=3),
        [Entity("u", {}, {"age": 24})],
        [Entity(str(n), {}, {"title": title}) for n, title in enumerate(TITLES, 1)],
        user=np.zeros(3, np.int64),
        item=np.arange(3),
        rating=np.array([5, 2, 4], dtype=np.float32),
        time=np.arange(3),
        positive_above=3.0,
    ).save(tmp_path / "dataset")
    render_prompts(WorkFolder(tmp_path))
    model = ScriptedModel(answer, price=lambda read, written: written / 100)
    generate(WorkFolder(tmp_path), model, retries=1, now=lambda: NOON)
    encode(WorkFolder(tmp_path), HashingEncoder(64))
    return WorkFolder(tmp_path)


def run(work: WorkFolder, *words: str) -> Result:
    return CliRunner().invoke(knowledge, [*words, "--work", str(work)], terminal_width=200)


def test_show_tells_all_about_a_text(work: WorkFolder, tmp_path: Path) -> None:
    done = run(work, "show", "item", "1", "--json", str(tmp_path / "show.json"))
    assert done.exit_code == 0, done.exception
    for words in ("Introduce one film", "Amber Road tells", "in use", "scripted", "2026-11-22 12:00 UTC", "duplicate"):
        assert words in done.output
    report = json.loads((tmp_path / "show.json").read_text())
    assert (report["quarantined"], report["record"]["id"]) == (False, "1")
    assert [near["id"] for near in report["neighbours"]] == ["2"]
    assert -1 <= report["neighbours"][0]["cosine"] < 1


def test_show_tells_why_a_text_is_not_used(work: WorkFolder) -> None:
    done = run(work, "show", "item", "3")
    for words in ("quarantined, not used", "I cannot help with that.", "refusal", "failed", "1 earlier answer"):
        assert words in done.output
    assert "nearest" not in done.output


def test_show_of_a_user_tells_what_it_was_written_from(work: WorkFolder) -> None:
    assert "the first 2 interactions" in run(work, "show", "user", "u").output


def test_show_of_an_entity_without_a_text_says_so(work: WorkFolder) -> None:
    generate(work, ScriptedModel(answer), retries=1, limit=1, now=lambda: NOON)
    done = run(work, "show", "item", "2")
    assert "There is no text about item 2" in done.output


def test_show_says_when_a_prompt_has_changed_since(work: WorkFolder) -> None:
    render_prompts(work, "books")
    assert "which has changed since" in run(work, "show", "item", "1").output


def test_show_refuses_who_is_not_there(work: WorkFolder) -> None:
    assert isinstance(run(work, "show", "item", "99").exception, NotFoundError)


def test_costs_add_up(work: WorkFolder, tmp_path: Path) -> None:
    done = run(work, "costs", "--by", "entity", "--json", str(tmp_path / "costs.json"))
    assert done.exit_code == 0, done.exception
    report = json.loads((tmp_path / "costs.json").read_text())
    assert [(group["entity"], group["calls"]) for group in report["groups"]] == [("item", 4), ("user", 1)]
    total = sum(group["cost_usd"] for group in report["groups"])
    assert report["all"]["cost_usd"] == pytest.approx(total)
    assert f"{total:.4f}" in done.output


def test_costs_refuse_unknown_columns_and_need_a_ledger(work: WorkFolder, tmp_path: Path) -> None:
    assert isinstance(run(work, "costs", "--by", "mood").exception, InputError)
    (tmp_path / "empty").mkdir()
    assert isinstance(run(tmp_path / "empty", "costs").exception, PreconditionError)
