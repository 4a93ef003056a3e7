"""The tables of docs/kernels.md are those of the committed reports."""

import json
import re
import shutil

import pytest
from tests.support.paths import DOCS

from kar_bench.performance.kernels import write_docs
from kar_kernels_bench.report import roofline_table
from kar_sidecar.errors import InputError

pytestmark = pytest.mark.unit

PAGE = (DOCS / "kernels.md").read_text(encoding="utf-8")
KERNELS = json.loads((DOCS / "results" / "kernels-cpu.json").read_text())
MODES = json.loads((DOCS / "results" / "modes.json").read_text())


def test_the_page_is_what_the_report_would_write(tmp_path):
    page = shutil.copyfile(DOCS / "kernels.md", tmp_path / "kernels.md")
    write_docs(KERNELS, page)
    assert page.read_text(encoding="utf-8") == PAGE
    assert roofline_table() in PAGE


def test_a_page_without_blocks_is_told(tmp_path):
    (tmp_path / "kernels.md").write_text("# Kernels\n")
    with pytest.raises(InputError, match="has no block <!-- aot -->"):
        write_docs(KERNELS, tmp_path / "kernels.md")
    with pytest.raises(InputError, match=r"other\.md"):
        write_docs(KERNELS, tmp_path / "other.md")


def test_the_report_was_measured_on_an_idle_machine_and_spills_nothing():
    assert KERNELS["busy_cores"] < 0.15
    assert {(row["batch"], row["dim"]) for row in KERNELS["cpu"]} == {(n, 768) for n in (1, 128, 512, 65_536)}
    assert all(one["spill_bytes"] == 0 for one in KERNELS["aot"])
    chosen = [row for row in KERNELS["cpu"] if row["selected"]]
    assert len(chosen) == 4
    # Not slower than the loop of the same dtype anywhere.
    assert all(row["speedup_vs_eager_same_dtype"] > 1 for row in KERNELS["cpu"] if row["implementation"] == "cpu")


def test_serving_modes_of_the_page_are_in_the_committed_report():
    table = re.search(r"<!-- modes -->\n\n((?:\|.*\n)+)", PAGE).group(1)
    header, _, *lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    assert header == ["", "prestored", "encoded"]
    told = {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in lines}
    for row in MODES["rows"]:
        cell = told[f"{row['candidates']} candidates, p50 / p95 / p99, ms"][row["mode"]]
        assert cell == " / ".join(f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
        assert row["errors"] == 0
    steps = {
        "export": "export_s",
        "publish": "publish_s",
        "load and activate": "load_s",
        "from a trained model to an answer of it": "total_s",
    }
    for mode in header[1:]:
        found = MODES["bytes_per_entity"][mode]
        cell = told["bytes an entity, record / in LMDB"][mode]
        assert cell == f"{found['record_bytes']:,.0f} / {found['lmdb_bytes']:,.0f}"
        for name, key in steps.items():
            assert told[f"{name}, s"][mode] == f"{MODES['checkpoint_to_serving'][mode][key]:.2f}"
    assert max(MODES["others_busy_cores"].values()) < 0.15
