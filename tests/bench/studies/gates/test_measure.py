import json
import re
from dataclasses import replace

import pytest
from tests.support.paths import DOCS

from kar.records.v1 import records_pb2
from kar_bench.harness import to_json
from kar_bench.studies.gates.corruptions import CORRUPTIONS
from kar_bench.studies.gates.measure import GatesBenchmarkOptions, measure_gates
from kar_bench.studies.gates.report import gates_table
from kar_offline.check import DUPLICATE_GATE, GATES
from kar_offline.check.facts import FactsTable, Film
from kar_offline.dataset.dataset import Dataset
from kar_offline.dataset.entities import Entity
from kar_offline.knowledge.records import write_knowledge, write_quarantine
from kar_offline.work_folder import WorkFolder
from kar_sidecar.entities import ITEM
from kar_sidecar.errors import PreconditionError


def film(number: int) -> str:
    """The name of a film; no two share a word."""
    return " ".join("abcdefghij"[int(digit)] * 3 + "o" for digit in f"{number:02}").title()


def people(number: int) -> list[str]:
    """The director of a film and its cast."""
    last = film(number).replace(" ", "").title()
    return [f"{first} {last}" for first in ("Otto", "Ann", "Max", "Ida", "Leo", "Eva")]


def text(number: int) -> str:
    words = [f"{'bcdfghklmn'[at % 10]}{'aeiou'[number % 5]}{number}{at}" for at in range(40)]
    sentences = (" ".join(words[at : at + 10]).capitalize() + "." for at in range(0, 40, 10))
    director, star, *_ = people(number)
    return f"{film(number)} is a drama directed by {director}, starring {star}. {' '.join(sentences)}"


@pytest.fixture
def films(work: WorkFolder) -> WorkFolder:
    """The work folder with named films, a pack about them and their viewers, and generated texts."""
    dataset = work.read(Dataset)
    items = [
        Entity(item.id, item.features, {"title": f"{film(at)} (1990)", "genres": ["Drama", "Romance"]})
        for at, item in enumerate(dataset.items)
    ]
    replace(dataset, items=items).save(work.dataset)
    pack = work.root / "pack"
    pack.mkdir()
    (pack / "pack.toml").write_text('[templates]\nitem = "factual/1"\nuser = "reasoning/1"\n')
    lines = [{"id": item.id, "text": text(at)} for at, item in enumerate(items)]
    lines[0]["text"] = lines[0]["text"].replace(people(0)[0], "Nobody Known")
    (pack / "item.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    users = []
    for row, user in enumerate(dataset.users):
        shown = [film(item) for item in dataset.event_item[dataset.prompt_events(row)]]
        body = text(40 + row).split(". ", 1)[1]
        users.append({"id": user.id, "cutoff": 5, "text": f"A viewer fond of '{shown[0]}' and '{shown[1]}'. {body}"})
    (pack / "user.jsonl").write_text("".join(json.dumps(line) + "\n" for line in users))
    (work.root / "written").mkdir()
    made = [
        records_pb2.KnowledgeRecord(id=items[row].id, entity=ITEM.number, template="factual/1", text=text_)
        for row, text_ in ((2, text(2)), (3, f"{film(3)} (2015) is a drama that everybody must see."), (4, text(2)))
    ]
    write_knowledge(work.root / "written", made[:1])
    write_quarantine(work.root / "written", made[1:])
    return work


TABLE = FactsTable.of(
    "made", [Film(film(n), 1990, tuple(people(n)[:1]), ("Drama",), tuple(people(n)[1:])) for n in range(30)]
)


def test_released_generated_and_corrupted_texts_are_judged(films: WorkFolder) -> None:
    notices: list[tuple[int, int]] = []
    report = measure_gates(
        films,
        GatesBenchmarkOptions(films.root / "written", str(films.root / "pack"), 5, duplicate_texts=50),
        facts=TABLE,
        on_text=lambda done, total: notices.append((done, total)),
    )
    assert gates_table(report).renderables
    report = to_json(report)
    rows = {(row["texts"], row["half"]): row for row in report["rows"]}
    assert {key: (row["judged"], row["failed"]) for key, row in rows.items()} == {
        ("released, items", "developed on"): (15, 1),
        ("released, items", "held out"): (15, 0),
        ("released, users", "developed on"): (20, 0),
        ("released, users", "held out"): (20, 0),
        ("generated, items", "developed on"): (3, 2),
        ("generated, items", "held out"): (0, 0),
    }
    assert tuple(rows["released, items", "held out"]["gates"]) == (*GATES, DUPLICATE_GATE)
    assert rows["released, items", "developed on"]["gates"]["facts"] == [1, 0]
    [failure] = report["failures"]
    assert (failure["entity"], failure["id"]) == ("item", "i00")
    assert "directed by Nobody Known" in failure["facts"]
    assert report["accepted"] == ["i02"]
    assert rows["generated, items", "developed on"]["gates"][DUPLICATE_GATE] == [1, 0]
    assert report["facts"] == {"name": "made", "films": 30, "items": 30, "matched": 30}
    found = {result["corruption"]: result for result in report["corruptions"]}
    assert list(found)[:-1] == [corruption.name for corruption in CORRUPTIONS]
    for name in ("a refusal added", "as JSON", "another film's text", "another director", "contact details"):
        assert (found[name]["texts"], found[name]["found"]) == (5, 5), name
    for name in ("a later film, in quotes", "a later film, in a list", "another film's text, titles exchanged"):
        assert (found[name]["texts"], found[name]["found"]) == (5, 5), name
    assert found["a later film, as a guess"]["found"] == 0
    assert [done for done, _ in notices] == list(range(71, 71 + len(notices)))
    assert report["machine"]


def test_the_pack_alone_is_judged_without_facts(films: WorkFolder) -> None:
    report = to_json(measure_gates(films, GatesBenchmarkOptions(None, str(films.root / "pack"), 1, duplicate_texts=50)))
    assert {row["texts"] for row in report["rows"]} == {"released, items", "released, users"}
    assert (report["facts"], report["accepted"], report["failures"]) == (None, [], [])


def test_the_same_texts_are_corrupted_in_the_same_way_again(films: WorkFolder) -> None:
    first, second = (
        measure_gates(films, GatesBenchmarkOptions(None, str(films.root / "pack"), 3, duplicate_texts=50), facts=TABLE)
        for _ in range(2)
    )
    assert first.corruptions == second.corruptions


def test_a_folder_without_knowledge_is_refused(films: WorkFolder) -> None:
    with pytest.raises(PreconditionError, match="no knowledge in"):
        measure_gates(films, GatesBenchmarkOptions(films.dataset, str(films.root / "pack"), 1, duplicate_texts=50))


def table(name: str) -> list[list[str]]:
    """The rows of a table of the page of results."""
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- results/gates.json {name} -->\n+((?:\|.*\n)+)", page)
    assert found
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


def test_every_number_of_the_page_is_in_the_committed_report() -> None:
    report = json.loads((DOCS / "results" / "gates.json").read_text())
    assert table("rows") == [
        [
            *(row["texts"], row["half"], f"{row['judged']:,}", f"{row['failed']:,}"),
            ", ".join(f"{gate} {failed}" for gate, (failed, _) in row["gates"].items() if failed),
        ]
        for row in report["rows"]
    ]
    assert table("faults") == [
        [
            result["corruption"],
            ", ".join(result["gates"]),
            f"{result['texts']:,}",
            f"{result['found'] / result['texts']:.1%}",
        ]
        for result in report["corruptions"]
    ]
    assert {failure["id"] for failure in report["failures"]} == {"267", "907", "1410", "1412", "1420"}
    assert len(report["accepted"]) == 2
