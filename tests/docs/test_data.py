import asyncio
import json
import re
from pathlib import Path

import pytest
import typer
from tests.support.asking import Notes
from tests.support.paths import DOCS
from typer.testing import CliRunner

from kar_offline.dataset.command import dataset as dataset_command
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.mapping import load_mapping
from kar_offline.dataset.splits import SPLITS
from kar_offline.dataset.tabular_source import read_tables
from kar_offline.generate.pack import Pack
from kar_offline.generate.provider import Question, Reply
from kar_offline.prompts import Prompt, read_prompts, render_prompts
from kar_offline.prompts import scenario as scenarios
from kar_offline.prompts.command import prompts as prompts_command
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import IntegrityError, KarError, PreconditionError

pytestmark = pytest.mark.unit

TABLES = ("events", "users", "items")
DOC = (DOCS / "data.md").read_text(encoding="utf-8")
FOUND = re.findall(r"^```(\w+)\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)
MAPPING, SCENARIO = (text for language, text in FOUND if language == "toml")
BLOCKS = dict(FOUND)
CODE = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", DOC)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mapping.toml").write_text(MAPPING)
    for name, text in zip(TABLES, BLOCKS["csv"].split("\n\n"), strict=True):
        (tmp_path / f"{name}.csv").write_text(text.strip() + "\n")
    return tmp_path


def read(folder: Path) -> Dataset:
    files = [folder / f"{name}.csv" for name in TABLES]
    return read_tables(load_mapping(folder / "mapping.toml"), *files, history_length=30)


def pack_texts(folder: Path, prompts: list[Prompt]) -> list[str]:
    questions = [Question(p.entity, p.id, p.prompt, p.prompt_sha256, p.history_cutoff) for p in prompts]

    async def main() -> list[str]:
        answers = Pack.load(str(folder)).ask(questions, Notes())
        return [outcome.text async for _, outcome in answers if isinstance(outcome, Reply)]

    return asyncio.run(main())


def rows(folder: Path, name: str) -> int:
    return len((folder / f"{name}.csv").read_text().splitlines()) - 1


def test_the_example_is_what_the_page_says(folder: Path) -> None:
    dataset = read(folder)
    samples = [len(dataset.samples(split)) for split in range(len(SPLITS))]
    said = (
        f"{len(dataset.users)} users, {len(dataset.items)} items, {rows(folder, 'events')} rows, "
        f"{len(dataset.event_item)} events (ana's `p2` counts once), {sum(samples)} samples: {samples[0]} to train on, "
        f"{samples[1]} to validate, {samples[2]} to test."
    )
    assert said in " ".join(DOC.split())
    assert dataset.items[0].features == {"tags": ["sport", "shoes"], "price": 89.9}
    assert dataset.items[2].facts == {"title": "Mug", "tags": []}
    assert [user.features["age"] for user in dataset.users] == [34, 51, None]
    ana = slice(dataset.offsets[0], dataset.offsets[1])
    assert dataset.event_rating[ana].tolist() == [1, 5, 1]


def test_the_command_of_the_page_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    app = typer.Typer()
    app.command()(dataset_command)
    (line,) = (code for code in CODE if code.startswith("kar dataset --mapping"))
    assert CliRunner().invoke(app, line.split()[2:]).exit_code == 0
    assert len(Dataset.load(folder / "var" / "shop" / "dataset").sample_events) == 3


CHANGES = (
    ("events.csv", "ana,p3,2026-03-03T12:00:00Z", "ana,p3,yesterday"),
    ("events.csv", "1772442000,view", "1772442000,click"),
    ("events.csv", "elif,p4", "elif,p9"),
    ("items.csv", "p2,", "p1,"),
    ("items.csv", "Mug", ""),
)


@pytest.mark.parametrize(("change", "text"), list(zip(CHANGES, BLOCKS["text"].splitlines(), strict=True)))
def test_an_error_reads_as_quoted(folder: Path, change: tuple[str, str, str], text: str) -> None:
    file, old, new = change
    before = (folder / file).read_text()
    assert before.count(old) == 1
    (folder / file).write_text(before.replace(old, new))
    with pytest.raises(KarError) as caught:
        read(folder)
    assert str(caught.value) == text
    assert caught.value.exit_code == 2


def test_the_example_is_too_short_for_a_split_by_time(folder: Path) -> None:
    with pytest.raises(PreconditionError) as caught:
        read(folder).split_by_time()
    assert str(caught.value) in CODE


def test_the_scenario_of_the_page_shows_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "shop.toml").write_text(SCENARIO)
    (folder / "var" / "shop" / "dataset").mkdir(parents=True)
    read(folder).save(folder / "var" / "shop" / "dataset")
    app = typer.Typer()
    app.command()(prompts_command)
    (line,) = (code for code in CODE if code.startswith("kar prompts --scenario shop"))
    result = CliRunner().invoke(app, line.split()[2:])
    assert result.exit_code == 0, result.output
    told = [line for line in result.output.splitlines() if line.startswith(("item facts", "user facts"))]
    assert len(told) == 2
    assert set(told) <= set(CODE)
    item, *_, user = read_prompts(folder / "var" / "shop" / "prompts")
    assert (item.title, item.context["season"]) == ("Trail shoe", "garden")
    assert {item.expires_on, user.expires_on} == {"2026-06-15"}
    assert "here after 2026-06-15" in " ".join(DOC.split())
    assert "Bonn" not in user.prompt + user.raw_text
    assert result.output.count("never an instruction") == 2


def test_the_page_lists_the_keys_of_a_scenario() -> None:
    table = DOC[DOC.index("## Scenarios") :]
    keys = {
        *scenarios.Question.model_fields,
        *scenarios.Season.model_fields,
        *scenarios.Limits.model_fields,
        "language",
        "title",
    }
    mentioned = set(re.findall(r"`(?:\[\[?)?(\w+)(?:\]\]?)?`", table))
    assert keys - mentioned == {"name", "about", "events"}  # shown in the example


def test_the_knowledge_texts_answer_the_prompts_of_the_example(folder: Path) -> None:
    (folder / "dataset").mkdir()
    read(folder).save(folder / "dataset")
    render_prompts(WorkFolder(folder))
    prompts = read_prompts(folder / "prompts")
    notes = folder / "notes"
    notes.mkdir()
    lines = {name: next(c for c in CODE if c.startswith('{"id"') and f'"{name}"' in c) for name in ("p3", "ana")}
    (notes / "item.jsonl").write_text(lines["p3"] + "\n")
    (notes / "user.jsonl").write_text(lines["ana"] + "\n")
    assert pack_texts(notes, prompts) == [json.loads(line)["text"] for line in lines.values()]
    (notes / "user.jsonl").write_text(lines["ana"].replace('"cutoff": 2', '"cutoff": 3') + "\n")
    with pytest.raises(IntegrityError) as caught:
        pack_texts(notes, prompts)
    assert str(caught.value) in CODE
