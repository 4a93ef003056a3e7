import json
import re

import numpy as np
import pytest
from tests.support.paths import DOCS

from kar_bench.harness import IDLE_CORES

pytestmark = pytest.mark.unit

DOC = (DOCS / "results.md").read_text(encoding="utf-8")
METRICS = {"AUC": "auc", "LogLoss": "logloss", "GAUC": "gauc", "ECE": "ece", "MAP": "map", "NDCG": "ndcg"}
TABLES = re.findall(r"<!-- (results/\S+\.json) -->\n+((?:\|.*\n)+)", DOC)


def difference(found):
    mean, low, high = (f"{found[name] * 1e4:+.0f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def expected_cell(entry, column):
    if column in METRICS:
        return f"{entry[METRICS[column]]:.4f}"
    if column == "p (Holm)":
        return f"{entry['minus']['control']['p_holm']:.3f}" if "control" in entry["minus"] else ""
    other = column.removeprefix("- ")
    return difference(entry["minus"][other]) if other in entry["minus"] else ""


@pytest.mark.parametrize(("file", "table"), TABLES)
def test_every_number_of_the_page_is_in_the_committed_report(file, table):
    report = json.loads((DOCS / file).read_text())
    entries = {(entry["model"], entry["arm"]): entry for entry in report["summary"]}
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert header[:2] == ["model", "arm"]
    assert rows
    for model, arm, *cells in rows:
        assert cells == [expected_cell(entries[model, arm], column) for column in header[2:]], (model, arm)


@pytest.mark.parametrize(
    ("file", "model", "table"), re.findall(r"<!-- (results/\S+\.json) (\w+) by .* -->\n+((?:\|.*\n)+)", DOC)
)
def test_breakdowns_of_the_page_are_in_the_committed_report(file, model, table):
    report = json.loads((DOCS / file).read_text())
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    by, _, *arms = header
    found = {(e["arm"], e["bucket"]): e for e in report["breakdowns"] if (e["model"], e["by"]) == (model, by)}
    assert len(rows) == len({bucket for _, bucket in found})
    for bucket, samples, *cells in rows:
        assert samples == f"{found['control', bucket]['samples']:,}"
        assert cells == [f"{found[arm, bucket]['auc']:.4f}" for arm in arms]


@pytest.mark.parametrize(("model", "table"), re.findall(r"<!-- reports (\w+) -->\n+((?:\|.*\n)+)", DOC))
def test_tables_over_reports_are_in_the_committed_reports(model, table):
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    for name, *cells in rows:
        file = re.search(r"\((results/.*\.json)\)", name).group(1)
        entries = {(e["model"], e["arm"]): e for e in json.loads((DOCS / file).read_text())["summary"]}
        for column, cell in zip(header[1:], cells, strict=True):
            arm, _, other = column.partition(" - ")
            entry = entries.get((model, arm))
            if entry is None:
                assert cell == ""
            else:
                assert cell == (difference(entry["minus"][other]) if other else f"{entry['auc']:.4f}")


def test_the_direct_way_is_in_the_committed_report():
    report = json.loads((DOCS / "results" / "direct.json").read_text())
    table = re.search(r"<!-- direct -->\n+((?:\|.*\n)+)", DOC).group(1)
    _, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    for found, cells in zip(report["rows"], rows, strict=True):
        expected = [found["ranker"], f"{found['map']:.4f}", f"{found['ndcg']:.4f}", f"{found['hits_at_1']:.2f}"]
        assert cells == expected + [f"{found[name]:,.1f}" if name in found else "" for name in ("p50_ms", "p99_ms")]


def test_shared_calls_of_the_page_are_in_the_committed_report():
    report = json.loads((DOCS / "results" / "collective.json").read_text())
    table = re.search(r"<!-- collective -->\n+((?:\|.*\n)+)", DOC).group(1)
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert {entry["share"] for entry in report["summary"]} == {0, 1, 0.3, 0.1, 0.03}
    for found, (arm, way, share, calls, *cells) in zip(report["summary"], rows, strict=True):
        assert (arm, way) == (found["arm"], found["way"])
        assert share == (f"{100 * found['share']:g} %" if found["share"] else "")
        assert calls == f"{found['item_calls']:,.0f}"
        assert cells == [
            f"{found[METRICS[column]]:.4f}"
            if column in METRICS
            else difference(found["minus"][name])
            if (name := column.removeprefix("- ")) in found["minus"]
            else ""
            for column in header[4:]
        ]
    picture = re.search(r"!\[.*\]\((results/collective\.png)\)", DOC).group(1)
    assert (DOCS / picture).is_file()


def speed(name):
    """Header and rows of the page's table of the training benchmark."""
    table = re.search(rf"<!-- results/training-speed.json {name} -->\n+((?:\|.*\n)+)", DOC).group(1)
    header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    return header, rows


def test_speeds_of_the_page_are_in_the_committed_report():
    report = json.loads((DOCS / "results" / "training-speed.json").read_text())
    assert max(report["others_busy_cores"].values()) < IDLE_CORES
    header, rows = speed("samples a second")
    found = {(r["model"], r["arm"], r["implementation"], r["phase"]): r for r in report["rows"]}
    assert len(rows) * 2 == len(found)
    for *of, train, score in rows:
        for phase, cell in zip(header[3:], (train, score), strict=True):
            one = found[*of, phase]
            assert cell == f"{one['samples_per_s']:,.0f} [{one['low']:,.0f}, {one['high']:,.0f}]"
    header, rows = speed("ratios")
    ratios = {(r["model"], r["phase"]): r for r in report["ratios"]}
    assert len(rows) == len(ratios)
    for model, phase, *cells in rows:
        assert cells == [f"{ratios[model, phase][name]:.2f}x" for name in header[2:]]
    _, rows = speed("AUC")
    for model, implementation, mean, *cells in rows:
        of = [r["auc"] for r in report["auc"] if (r["model"], r["implementation"]) == (model, implementation)]
        assert cells == [f"{auc:.4f}" for auc in of]
        assert mean == f"{np.mean(of):.4f}"


@pytest.mark.parametrize("file", sorted(path.name for path in (DOCS / "results").glob("*.json")))
def test_a_committed_report_says_how_it_was_made(file):
    assert f"results/{file}" in DOC
    report = json.loads((DOCS / "results" / file).read_text())
    assert report["command"].startswith("kar bench")
    assert report["command"] in DOC
    assert report["machine"]


def test_the_full_table_is_there():
    report = json.loads((DOCS / "results" / "ml-100k.json").read_text())
    assert len(TABLES) >= 2
    folds = {}
    for row in report["rows"]:
        folds.setdefault((row["model"], row["arm"]), set()).add(row["fold"])
    assert len({model for model, _ in folds}) == 13
    assert all(found == set(range(5)) for found in folds.values())
