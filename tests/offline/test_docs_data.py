import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kar_offline.dataset.command import dataset as dataset_command
from kar_offline.dataset.samples import SPLITS, Dataset
from kar_offline.dataset.table import load_mapping, read_tables
from kar_offline.generate import Pack
from kar_offline.prompts import read_prompts, render_prompts
from kar_sidecar.errors import IntegrityError, KarError, PreconditionError

pytestmark = pytest.mark.unit

TABLES = ("events", "users", "items")
DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE))
CODE = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", DOC)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mapping.toml").write_text(BLOCKS["toml"])
    for name, text in zip(TABLES, BLOCKS["csv"].split("\n\n"), strict=True):
        (tmp_path / f"{name}.csv").write_text(text.strip() + "\n")
    return tmp_path


def read(folder: Path) -> Dataset:
    files = [folder / f"{name}.csv" for name in TABLES]
    return read_tables(load_mapping(folder / "mapping.toml"), *files, history_length=30)


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


def test_the_knowledge_texts_answer_the_prompts_of_the_example(folder: Path) -> None:
    (folder / "dataset").mkdir()
    read(folder).save(folder / "dataset")
    render_prompts(folder)
    prompts = read_prompts(folder / "prompts")
    notes = folder / "notes"
    notes.mkdir()
    lines = {name: next(c for c in CODE if c.startswith('{"id"') and f'"{name}"' in c) for name in ("p3", "ana")}
    (notes / "item.jsonl").write_text(lines["p3"] + "\n")
    (notes / "user.jsonl").write_text(lines["ana"] + "\n")
    records = Pack.load(str(notes)).records(prompts)
    assert [record.text for record in records] == [json.loads(line)["text"] for line in lines.values()]
    (notes / "user.jsonl").write_text(lines["ana"].replace('"cutoff": 2', '"cutoff": 3') + "\n")
    with pytest.raises(IntegrityError) as caught:
        Pack.load(str(notes)).records(prompts)
    assert str(caught.value) in CODE
